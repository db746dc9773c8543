"""Skeletons of 1, 5 and 133 points, of a category that is not "person", through the whole chain. Hands have 21 points."""

import json

import cv2
import numpy as np
import pytest

from tests.conftest import pipeline

SIZE = 96
NETWORK = ["model=simplebaseline", "model.depth=18", "model.width=0.25", "model.stem=3x3", "model.deconvolution=32"]


def skeleton(K):
    """A chain of K points. The second half mirrors the first."""
    pairs = [[n, K - 1 - n] for n in range(K // 2)]
    return {
        "names": [f"point_{n}" for n in range(K)], "limbs": [[n, n + 1] for n in range(K - 1)], "sigmas": [0.08] * K,
        "mirror": pairs,
    }  # fmt: skip


def drawn(folder, name, K, images, seed):
    """Images of dark noise with gadgets: filled boxes, and points along a wave, of which mirrored ones share a colour."""
    draw, records, files = np.random.default_rng(seed), [], []
    (folder / name).mkdir()
    for image in range(100 * seed, 100 * seed + images):
        canvas = draw.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        for left in (4, 52):
            x, y, side = left + draw.integers(0, 8), draw.integers(4, 40), int(draw.integers(32, 40))
            cv2.rectangle(canvas, (int(x), int(y)), (int(x + side), int(y + side)), (90, 90, 90), -1)
            at = np.linspace(0, 1, K) if K > 1 else np.array([draw.random()])
            points = np.stack((x + 2 + at * (side - 4), y + side / 2 + np.cos(at * 2 * np.pi) * side / 3), axis=1)
            for n, point in enumerate(points):
                colour = cv2.applyColorMap(np.uint8([[255 * min(n, K - 1 - n) * 2 // K]]), cv2.COLORMAP_RAINBOW)[0, 0].tolist()
                cv2.circle(canvas, tuple(int(v) for v in np.rint(point)), 3, colour, -1)
            records.append(
                {
                    "id": len(records) + 1, "image_id": image + 1, "category_id": 7, "iscrowd": 0,
                    "bbox": [float(x), float(y), float(side), float(side)], "area": float(side * side), "num_keypoints": K,
                    "keypoints": [float(v) for point in points for v in (*point, 2)],
                }
            )  # fmt: skip
        cv2.imwrite(str(folder / name / f"{image + 1}.png"), canvas)
        files.append({"id": image + 1, "file_name": f"{image + 1}.png", "height": SIZE, "width": SIZE})
    shape = skeleton(K)
    category = {
        "id": 7, "name": "gadget", "keypoints": shape["names"], "skeleton": [[a + 1, b + 1] for a, b in shape["limbs"]],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps({"images": files, "annotations": records, "categories": [category]}))


@pytest.fixture(scope="module", params=[1, 5, 133])
def chain(request, tmp_path_factory):
    """The number of points, the folder after the chain, and what the command said."""
    K = request.param
    folder = tmp_path_factory.mktemp(f"points_{K}")
    counts = {"train": 48, "val": 24}
    for seed, (name, count) in enumerate(counts.items()):
        drawn(folder, name, K, count, seed)
    (folder / "skeleton.json").write_text(json.dumps(skeleton(K)))
    words = [
        "family=topdown", "data=coco", "skeleton=skeleton.json", "weights=null", "tracking=none",
        *(f"data.{name}.{what}" for name in counts for what in (f"images={name}", f"annotations={name}.json")),
        "training_resolution=96x96", "pruner=l1", "precision=int8", "sampler.num_images=8", *NETWORK, "flip=true",
        "stages.train.training.steps=60", "stages.train.training.lr=3e-3", "stages.train.training.batch_size=8",
        "stages.train.training.warmup=5",
        "stages.retrain.training.steps=12", "stages.retrain.training.batch_size=4",
        "stage=[train,prune,retrain,export,sample,quantize,build,tune,evaluate]",
    ]  # fmt: skip
    done = pipeline(*words, cwd=folder, check=0)
    return K, folder, done


def test_the_chain_finds_the_points_of_its_skeleton(chain):
    K, folder, _ = chain
    (evaluated,) = (folder / "outputs").glob("*/evaluate/*")
    found = json.loads((evaluated / "metrics.json").read_text())
    assert found["category"] == "gadget"
    rows = json.loads((evaluated / "predictions.json").read_text())
    assert rows
    assert {len(row["keypoints"]) for row in rows} == {3 * K}
    assert found["ap50"] > 0.6


def test_pictures_show_every_image_with_its_gadgets(chain):
    _, folder, _ = chain
    (evaluated,) = (folder / "outputs").glob("*/evaluate/*")
    pictures = list((evaluated / "pictures").glob("*.jpg"))
    assert pictures
    for picture in pictures:
        ours, given = (
            cv2.imread(str(file)).astype(int) for file in (picture, folder / "val" / f"{100 + int(picture.stem)}.png")
        )
        assert (np.abs(ours - given).max(axis=2) > 60).sum() > 10, "the points are drawn"
