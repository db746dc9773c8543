"""The option `skeleton`: names, files of both forms, and what is wrong with a file."""

import json
import re

import pytest

from posepress.labels import Skeleton
from posepress.skeletons import COCO_17, skeleton_of
from tests.conftest import SMOKE, pipeline

HAND = {"names": [f"p{n}" for n in range(21)], "edges": [[n, n + 1] for n in range(20)], "sigmas": [0.03] * 21}


def test_all_forms_give_the_same_skeleton():
    own = skeleton_of(HAND)
    category = {"keypoints": HAND["names"], "skeleton": [[a + 1, b + 1] for a, b in HAND["edges"]], "sigmas": HAND["sigmas"]}
    assert skeleton_of(category) == own
    assert own.limbs[0] == (0, 1)
    assert skeleton_of("coco_17") is COCO_17
    assert skeleton_of(own) is own


def test_mirror_pairs_decide_before_names():
    made = skeleton_of({"names": ["left_a", "right_a", "b", "c"], "mirror": [[2, 3]]})
    assert made.flip == (0, 1, 3, 2)
    assert skeleton_of({"names": ["left_a", "right_a", "b", "c"]}).flip == (1, 0, 2, 3)
    assert Skeleton(("a", "b")).oks_sigmas == (0.05, 0.05)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"names": ["a", "a"]}, "names: 'a' is there 2 times"),
        ({"names": ["a", "b"], "edges": [[0, 5]]}, r"limbs\[0\]=\[0, 5\]: there are 2 keypoints"),
        ({"names": ["a", "b"], "mirror": [[0]]}, r"mirror\[0\]=.*give two indices"),
        ({"names": ["a", "b", "c"], "mirror": [[0, 1], [1, 2]]}, "mirror: 'b' is in two pairs"),
        ({"names": ["a", "b"], "mirror": [[1, 1]]}, "joins 'b' with itself"),
        ({"names": ["a", "b"], "sigmas": [0.1]}, "1 numbers for 2 keypoints"),
        ({"names": ["a"], "nose": 1}, "nose: no such key"),
        ([1, 2], "holds a list; give an object with names"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, said):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    done = pipeline(*SMOKE, "stage=train", "skeleton=mine.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: skeleton=mine.json: " in done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_missing_file_and_no_json(tmp_path):
    assert "skeleton=coco17: no such file; did you mean 'coco_17'" in pipeline(*SMOKE, "skeleton=coco17", cwd=tmp_path).stderr
    (tmp_path / "mine.json").write_text("{")
    assert "skeleton=mine.json: no JSON file" in pipeline(*SMOKE, "skeleton=mine.json", cwd=tmp_path).stderr


def test_unknown_names_are_value_errors():
    with pytest.raises(ValueError, match="skeleton=coco_18: choose coco_17, openpose_18"):
        skeleton_of("coco_18")
