"""Annotation files, splits files and files of results that are not what they should be: read, or refused in one line."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.datasets import annotations
from pipeline.datasets.annotations import load_annotations
from pipeline.datasets.coco import CocoSplits
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.results import load_results
from posepress.errors import UserError
from posepress.image_headers import read_header
from posepress.images import read_image
from posepress.skeletons import COCO_17

ALIKE = settings(deadline=None, suppress_health_check=list(HealthCheck))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(["1", "../../x", "/etc/passwd", "a\\b", "\x00", "1.jpg", 1e300, -0.0, [[]], {}, [], "person", 10**400]),
    st.recursive(
        st.integers(0, 3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    ),
)
K = len(COCO_17.names)


def whole():
    """A file with two images and three annotations, one of them a dog."""
    person = {
        "category_id": 1,
        "iscrowd": 0,
        "area": 50.0,
        "num_keypoints": K,
        "keypoints": [3, 4, 2] * K,
        "bbox": [1, 2, 8, 9],
    }
    polygon = {"segmentation": [[1, 2, 3, 4, 5, 6]]}
    runs = {"segmentation": {"size": [9, 9], "counts": [40, 41]}, "iscrowd": 1}
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 9, "width": 9, "flickr_url": "http://a"} for n in (1, 2)],
        "annotations": [
            {**person, "id": 1, "image_id": 1, **polygon},
            {**person, "id": 2, "image_id": 2, **runs},
            {"id": 3, "image_id": 2, "category_id": 18, "bbox": [0, 0, 1, 1], "area": 1},
        ],
        "categories": [
            {"id": 1, "name": "person", "keypoints": list(COCO_17.names), "skeleton": [[1, 2]]},
            {"id": 18, "name": "dog"},
        ],
    }


def places(value, at=()):
    """Every place in nested data."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    if isinstance(value, list):
        for n, inner in enumerate(value[:6]):
            yield from places(inner, (*at, n))


def put(raw, at, new):
    """The same with another value at a place, which is a copy: what it is drawn from must not change with it."""
    new = deepcopy(new)
    if not at:
        return new
    parent = raw
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = new
    return raw


def written(file, raw, layout):
    text = json.dumps(raw, **layout)
    file.write_bytes((b"\xef\xbb\xbf" if layout else b"") + text.encode("utf-8", "surrogatepass"))
    return file


def looked_at(folder, file, category):
    """Everything that is read of an annotation file."""
    data = Coco(folder, file, category=category)
    table = data.table()
    assert all(len(column) == len(data) for column in table.values())
    assert np.isfinite(table["area"]).all()
    for n in range(len(data)):
        truth = data[n].truth
        assert np.isfinite(truth.keypoints).all()
        assert np.isfinite(truth.boxes).all()
        assert np.isfinite(truth.areas).all()
        assert set(np.unique(truth.keypoints[..., 2])) <= {0, 1, 2}
        assert (folder / data.records[n]["file_name"]).resolve().is_relative_to(folder.resolve())
    data.doubts(folder)


@ALIKE
@given(st.data())
def test_a_file_with_a_wrong_value_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    raw = whole()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(list(places(raw))))
        raw = put(raw, at, data.draw(ODD))
    layout = data.draw(st.sampled_from([{}, {"indent": 1}]))
    category = data.draw(st.sampled_from([None, None, "person", 1, 18, "cat"]))
    try:
        looked_at(folder, written(folder / "fuzz.json", raw, layout), category)
    except UserError as error:
        assert len(str(error)) < 1500
        assert "\n" not in str(error)


@ALIKE
@given(st.data())
def test_what_the_arrays_take_is_what_the_records_say(tmp_path_factory, data):
    """Files read in pieces and looked at as arrays give what one by one looks give."""
    folder = tmp_path_factory.getbasetemp()
    raw = whole()
    person = raw["annotations"][0]
    draw = data.draw
    for n in range(draw(st.integers(0, 5))):
        seen = draw(st.lists(st.integers(0, 2), min_size=K, max_size=K))
        points = [v for s in seen for v in (draw(st.integers(-5, 20)), draw(st.floats(-5, 20)), s)]
        box = draw(st.sampled_from([[1, 2, 3, 4.5], [0, 0, 0, 0], [0, 0, 1, 0], []])) if any(seen) else [1, 1, 1, 1]
        new = {**person, "id": 10 + n, "keypoints": points, "bbox": box, "iscrowd": draw(st.integers(0, 1))}
        for key in draw(st.sets(st.sampled_from(["area", "num_keypoints", "iscrowd", "segmentation", "category_id"]))):
            if key != "category_id":
                new.pop(key)
        raw["annotations"].append(new)
    found = load_annotations(written(folder / "alike.json", raw, {}))
    nulls = {**raw, "annotations": [{**a, "note": True} for a in raw["annotations"]]}
    other = load_annotations(written(folder / "alike.json", nulls, {"indent": 1}))
    assert [{k: v for k, v in a.items() if k not in ("note", "segmentation")} for a in other.people] == [
        {k: v for k, v in a.items() if k != "segmentation"} for a in found.people
    ]
    for name in ("visibility", "areas", "labelled", "crowd"):
        assert np.array_equal(getattr(found, name), getattr(other, name)), name
    assert found.left_out == other.left_out == 1
    truth = annotations.people(found.people)
    assert np.array_equal(truth.areas, found.areas)
    assert np.array_equal(truth.keypoints[..., 2], found.visibility)
    assert np.array_equal(truth.ignored, found.crowd | (found.labelled == 0))


@ALIKE
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xef\xbb\xbf", b'{"images":[],"annotations":[{', b"\xff\xfe", b"[" * 5000])
)
def test_bytes_that_are_no_annotations_are_refused(tmp_path_factory, content, start):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(start + content)
    for read in (
        lambda: load_annotations(file),
        lambda: load_results(file, COCO_17, {"1"}),
        lambda: CocoSplits({"images": file.parent}, {"images": file.parent}, splits=str(file)).parts,
    ):
        with pytest.raises(UserError):
            read()


@ALIKE
@given(st.data())
def test_a_splits_file_with_a_wrong_value_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    file = written(folder / "labels.json", whole(), {})
    named = {"train": {"a": ["1.jpg"]}, "tune": {"a": "all"}, "validation": {"b": ["2.jpg"]}, "agreement": {"c": []}, "note": 1}
    for _ in range(data.draw(st.integers(1, 2))):
        named = put(named, data.draw(st.sampled_from(list(places(named)))), data.draw(ODD))
    part = {"images": folder, "annotations": file}
    splits = CocoSplits(part, part, {"images": folder}, str(written(folder / "splits.json", named, {})), str(folder / "cache"))
    for ask in (lambda: splits.parts, lambda: splits.open("validation"), lambda: splits.digest(["train", "agreement"])):
        try:
            ask()
        except UserError as error:
            assert "\n" not in str(error)


@ALIKE
@given(st.data())
def test_results_with_a_wrong_value_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    category = load_annotations(written(folder / "labels.json", whole(), {})).category
    record = {"image_id": 1, "category_id": 1, "keypoints": [1.5, 2, 0.5] * K, "score": 0.5}
    raw = [dict(record), {**record, "score": 0.25}, {**record, "category_id": 18, "keypoints": [1, 2, 1]}]
    for _ in range(data.draw(st.integers(1, 2))):
        raw = put(raw, data.draw(st.sampled_from(list(places(raw)))), data.draw(ODD))
    try:
        found = load_results(written(folder / "results.json", raw, {}), COCO_17, {"1", "2"}, category)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for poses in found.values():
            assert np.isfinite(poses.keypoints).all()
            assert all(math.isfinite(score) and score >= 0 for score in poses.scores)


def _images():
    import cv2

    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)
    return {kind: cv2.imencode(kind, pixels)[1].tobytes() for kind in (".jpg", ".png", ".webp", ".bmp")}


@ALIKE
@given(st.data())
def test_damaged_images_are_read_or_refused(tmp_path_factory, data):
    kind, content = data.draw(st.sampled_from(list(_images().items())))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 60) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))] if data.draw(st.booleans()) else damaged
    file = tmp_path_factory.getbasetemp() / f"damaged{kind}"
    file.write_bytes(bytes(damaged))
    read_header(bytes(damaged))
    try:
        image = read_image(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert image.shape[2] == 3
        assert image.size < 3e8


def test_fill_bytes_of_a_jpeg_are_skipped():
    size = b"\xc0\x00\x11\x08\x00\x1e\x00\x28" + bytes(20)  # a frame of 30x40
    for count in (1, 2, 65535, 65536, 65537, 200_001):
        header = read_header(b"\xff\xd8" + b"\xff" * count + size)
        assert header is not None
        assert (header.size.height, header.size.width) == (30, 40)
    assert read_header(b"\xff\xd8" + b"\xff" * 200_000) is None
