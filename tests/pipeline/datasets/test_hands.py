"""Generated hands: another category than people, with a skeleton of 21 points, through the chain."""

import json

import numpy as np
import pytest

from pipeline.datasets.hands import Hands
from pipeline.datasets.synthetic import Synthetic
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.skeletons import HAND_21
from tests.conftest import pipeline

PRESET = Hands(Resolution(120, 160))
COUNTS = {"train": 12, "unlabelled": 1, "tune": 4, "agreement": 1, "validation": 6}


def test_labels_lie_on_the_hands():
    """A visible point is inside the hand's box, and most points are visible."""
    seen = total = 0
    for n in range(20):
        image, records = PRESET.draw([3, n])
        assert image.shape == (120, 160, 3)
        for record in records:
            points = np.array(record["keypoints"]).reshape(-1, 3)
            assert len(points) == len(HAND_21.names)
            assert record["num_keypoints"] == (points[:, 2] > 0).sum()
            x, y, width, height = record["bbox"]
            visible = points[points[:, 2] == 2]
            assert ((visible[:, 0] > x - 1) & (visible[:, 0] < x + width)).all()
            assert ((visible[:, 1] > y - 1) & (visible[:, 1] < y + height)).all()
            seen, total = seen + len(visible), total + len(points)
    assert 0.6 < seen / total < 1


def test_equal_seeds_give_equal_images():
    image, records = PRESET.draw([1, 2])
    again, same = PRESET.draw([1, 2])
    assert np.array_equal(image, again)
    assert records == same
    assert not np.array_equal(image, PRESET.draw([1, 3])[0])


@pytest.mark.parametrize("option", ["hands", "lengths"])
def test_a_minimum_above_its_maximum_is_refused(option):
    with pytest.raises(UserError, match=rf"data.preset.{option}=\[3,1\]: give the least first"):
        Hands(Resolution(120, 160), **{option: (3, 1)})


def test_a_network_of_hands_goes_through_the_chain(tmp_path):
    words = [
        "experiment=topdown_quickstart", "data=synthetic_hands", "skeleton=hand_21", "weights=null", "tracking=none",
        "model.width=0.25", "model.deconvolution=64", "training_resolution=64x64", "sampler.num_images=4", "flip=true",
        f"data.counts={{{', '.join(f'{name}: {count}' for name, count in COUNTS.items())}}}",
        "stages.train.training.steps=6", "stages.train.training.batch_size=4", "stages.train.training.warmup=2",
        "stages.retrain.training.steps=2", "stages.retrain.training.batch_size=4", "pruner=l1", "precision=int8",
    ]  # fmt: skip
    stages = "stage=[train,prune,retrain,export,sample,quantize,build,tune,evaluate]"
    done = pipeline(*words, stages, cwd=tmp_path, check=0)
    assert "sigmas" not in done.stderr, "the generated category has them"
    (evaluated,) = (tmp_path / "outputs/topdown_quickstart/evaluate").iterdir()
    found = json.loads((evaluated / "metrics.json").read_text())
    assert found["category"] == "hand"
    assert 0 <= found["ap"] <= 1
    assert list((evaluated / "pictures").iterdir())
    rows = json.loads((evaluated / "predictions.json").read_text())
    assert all(len(row["keypoints"]) == 3 * 21 for row in rows)


def test_the_data_set_is_one_of_coco_s(tmp_path):
    data = Synthetic(PRESET, COUNTS, cache=str(tmp_path))
    images = data.open("validation")
    assert images.subject == "hand"
    assert images.labels.names == HAND_21.names
    assert images.labels.sigmas == HAND_21.sigmas
    assert len(images) == COUNTS["validation"]
