"""What labelling tools write: values of annotation files that are read, and those that are refused with the record's id."""

import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.coco_keypoints import CocoKeypoints
from pipeline.datasets.annotations import load_annotations, people
from pipeline.datasets.coco import CocoSplits
from pipeline.datasets.coco_split import Coco
from posepress.errors import UserError
from posepress.image_headers import read_header
from posepress.images import IMAGE_TYPES, read_image, shown_size
from posepress.labels import Skeleton
from posepress.results import Poses
from posepress.skeletons import COCO_17

POINTS = [10, 12, 2] * 16 + [40, 52, 1]


def person(**changes):
    given = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [5, 6, 50, 60], "area": 900, "iscrowd": 0}
    return {**given, "num_keypoints": 17, "keypoints": list(POINTS), **changes}


def content(*annotations, categories=None, **image):
    listed = [{"id": 1, "name": "person", "keypoints": list(COCO_17.names)}] if categories is None else categories
    images = [{"id": 1, "file_name": "a.png", "height": 80, "width": 90, **image}]
    return {"images": images, "annotations": list(annotations), "categories": listed}


def written(folder, raw, name="a.json"):
    (folder / name).write_text(json.dumps(raw))
    return folder / name


# --- one category ----------------------------------------------------------------------------------------------------------

DOG = {"id": 18, "name": "dog"}
HAND = {"id": 2, "name": "hand", "keypoints": ["wrist", "thumb", "index"], "sigmas": [0.1, 0.1, 0.1]}
PERSON = {"id": 1, "name": "person", "keypoints": list(COCO_17.names)}


def test_annotations_of_one_category_are_read_and_the_others_counted(tmp_path):
    hand = {"id": 8, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9], "keypoints": [1, 2, 2, 3, 4, 2, 5, 6, 2]}
    dog = {"id": 9, "image_id": 1, "category_id": 18, "bbox": "no box", "keypoints": None, "area": []}
    file = written(tmp_path, content(person(), hand, dog, categories=[DOG, PERSON, HAND]))
    found = load_annotations(file)
    assert [a["id"] for a in found.people] == [7]
    assert (found.category.id, str(found.category), found.left_out) == (1, "person", 2)
    for wanted in ("hand", 2, "2"):
        hands = load_annotations(file, wanted)
        assert [a["id"] for a in hands.people] == [8], wanted
        assert hands.category.labels.names == ("wrist", "thumb", "index")
    (said,) = Coco(tmp_path, file).doubts(tmp_path)
    assert said == "2 annotations of other categories than person are left out; data.category chooses"


@pytest.mark.parametrize(
    ("categories", "wanted", "message"),
    [
        (
            [HAND, {**HAND, "id": 3, "name": "foot"}],
            None,
            r"2 categories name keypoints \(hand, foot\); choose one with data\.cat",
        ),
        ([DOG, {"id": 3, "name": "cat"}], None, r"2 categories could be meant.*choose one with data\.category=NAME or its id"),
        ([PERSON, DOG], "persn", r"data\.category=persn: .*no such category; did you mean 'person'\?; it has person, dog"),
        ([HAND, {**HAND, "id": 3}], "hand", r"has 2 of that name; give the id of one, like data\.category=2"),
        ([{"name": "person"}], None, r"categories\[0\] has no 'id'"),
        ([PERSON, {**DOG, "id": 1}], None, "the category id 1 is there twice"),
        ([PERSON, {**DOG, "name": 4}], None, "category 18: name is 4, not text"),
        ("person", None, "categories is the text 'person', not a list"),
        ([{**HAND, "skeleton": [[0, 1]]}], None, r"category hand: skeleton holds \[0, 1\]; give pairs .* counted from 1 to 3"),
        ([{**HAND, "skeleton": [1, 2]}], None, "category hand: skeleton holds 1; give pairs"),
        ([{**HAND, "keypoints": ["a", "a"]}], None, "category hand: the keypoint a is there twice"),
        ([{**HAND, "keypoints": [1, 2]}], None, "category hand: keypoints is a list of 2; give a list of names"),
        ([{**HAND, "sigmas": [0.1]}], None, "category hand: 3 keypoints but 1 sigmas"),
        ([{**HAND, "sigmas": [0.1, -1, 0.1]}], None, "category hand: sigmas must be numbers above 0"),
    ],
)
def test_a_category_that_does_not_follow_is_asked_for(tmp_path, categories, wanted, message):
    file = written(tmp_path, content(categories=categories))
    with pytest.raises(UserError, match=message) as caught:
        load_annotations(file, wanted)
    assert str(file) in str(caught.value)


def test_without_categories_all_annotations_must_be_of_one(tmp_path):
    plain = {key: value for key, value in content(person(), person(id=8)).items() if key != "categories"}
    assert len(load_annotations(written(tmp_path, plain)).people) == 2
    plain["annotations"][1]["category_id"] = 18
    with pytest.raises(UserError, match=r"annotation 8: category_id is 18, others have 1.*data\.category=1"):
        load_annotations(written(tmp_path, plain))
    assert [a["id"] for a in load_annotations(written(tmp_path, plain), 18).people] == [8]


def test_the_only_category_or_person_is_meant_where_none_names_keypoints(tmp_path):
    assert (
        str(load_annotations(written(tmp_path, content(person(), categories=[{"id": 1, "name": "face"}]))).category) == "face"
    )
    both = content(person(), categories=[DOG, {"id": 1, "name": "Person"}])
    assert load_annotations(written(tmp_path, both)).category.id == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 5}, "annotation 7: category_id is 5, none of the file's categories"),
        ({"category_id": "1"}, "annotation 7: category_id is the text '1', none of"),
        ({"category_id": None}, "annotation 7 has no 'category_id', and there are 2 categories"),
    ],
)
def test_an_annotation_of_no_category_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_annotations(written(tmp_path, content(person(**change), categories=[PERSON, DOG])))


def test_the_digest_follows_the_category_and_its_skeleton(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((80, 90, 3), np.uint8))

    def digest(category, **change):
        hand = {"id": 8, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9], "keypoints": [1, 2, 2, 3, 4, 2, 5, 6, 2]}
        file = written(tmp_path, content(person(), hand, categories=[PERSON, {**HAND, **change}]))
        part = {"images": tmp_path, "annotations": file}
        return CocoSplits(part, part, cache=str(tmp_path / "cache"), category=category).digest(["validation"])

    assert digest(None) == digest("person") == digest("person", sigmas=[0.2] * 3)
    assert len({digest("person"), digest("hand"), digest("hand", sigmas=[0.2] * 3)}) == 3


# --- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"segmentation": None, "iscrowd": None, "area": None, "num_keypoints": None}, {"areas": [3000], "never": [False]}),
        ({"keypoints": [POINTS[n : n + 3] for n in range(0, 51, 3)]}, {"never": [False]}),
        ({"keypoints": None, "num_keypoints": None}, {"never": [True]}),
        ({"keypoints": []}, {"never": [False]}),  # as the reference code: the count decides
        ({"bbox": None}, {"boxes": [[10, 12, 30, 40]]}),
        ({"bbox": []}, {"boxes": [[10, 12, 30, 40]]}),
        ({"bbox": [0, 0, 0, 0]}, {"boxes": [[10, 12, 30, 40]]}),
        ({"bbox": [1, 2, 5, 0], "area": None}, {"boxes": [[10, 12, 30, 40]], "areas": [1200]}),
        ({"iscrowd": True}, {"crowd": [True], "never": [True]}),
        ({"num_keypoints": 0}, {"never": [True]}),
        ({"area": 0}, {"areas": [0]}),
        ({"num_keypoints": 17.0}, {"never": [False]}),
        ({"id": "seven"}, {"never": [False]}),
    ],
)
def test_null_is_absent_and_what_is_clear_is_read(tmp_path, change, expected):
    data = Coco(tmp_path, written(tmp_path, content(person(**change))))
    truth = people(data.truth.people)
    for name, values in expected.items():
        assert getattr(truth, name).tolist() == values, name
    assert data.table()["persons"].tolist() == [int(not truth.never[0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": [10, 12, None] * 17}, r"annotation 7: keypoints\[2\] is null; give x, y and a visibility"),
        ({"keypoints": ["10", 12, 2] * 17}, r"keypoints\[0\] is the text '10'.*without quotes"),
        ({"keypoints": [10, 12, True] * 17}, r"keypoints\[2\] is true"),
        ({"keypoints": [10, 12, 3] * 17}, r"the visibility keypoints\[2\] is 3; give 0 not labelled, 1 hidden or 2 visible"),
        ({"keypoints": [10, 12, 0.5] * 17}, r"the visibility keypoints\[2\] is 0\.5"),
        ({"keypoints": [10, 1e30, 2] * 17}, r"keypoints\[1\] is 1e\+30"),
        ({"keypoints": [[10, 12]] * 17}, "annotation 7: 17 keypoint numbers, not 51"),
        ({"keypoints": "none"}, "keypoints is the text 'none'; give 51 numbers"),
        ({"keypoints": {"a": 1}}, "keypoints is an object; give 51 numbers"),
        ({"bbox": [1, 2, 3]}, "annotation 7: bbox is a list of 3; give x, y, width and height"),
        ({"bbox": [1, 2, -3, 4]}, r"bbox is \[1, 2, -3, 4\]; width and height cannot be negative"),
        ({"bbox": [1, 2, 3, -4]}, r"bbox is \[1, 2, 3, -4\]; width and height cannot be negative"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"not JSON .*or hold NaN: download or export it again"),
        ({"bbox": [1, float("-inf"), 3, 4]}, r"not JSON .*or hold NaN"),
        ({"bbox": [1, 2, None, 4]}, r"bbox\[2\] is null; give x, y, width and height as numbers"),
        ({"bbox": [1, 2, "3", 4]}, r"bbox\[2\] is the text '3'"),
        ({"bbox": [[1, 2], [3, 4], 5, 6]}, r"bbox\[0\] is a list of 2"),
        ({"bbox": {"x": 1}}, "bbox is an object"),
        ({"bbox": None, "keypoints": None}, "annotation 7 has no 'bbox', and no labelled keypoint to make one of"),
        ({"area": -1}, "annotation 7: area is -1; give 0 to"),
        ({"area": "900"}, "area is the text '900'.*without quotes"),
        ({"area": [900]}, "area is a list of 1"),
        ({"num_keypoints": "17"}, "num_keypoints is the text '17'"),
        ({"num_keypoints": -1}, "num_keypoints is -1"),
        ({"num_keypoints": 1.5}, r"num_keypoints is 1\.5"),
        ({"iscrowd": 2}, "iscrowd is 2; give 0 to 1"),
        ({"iscrowd": "false"}, "iscrowd is the text 'false'"),
        ({"image_id": [1]}, "annotation 7: image_id is a list of 1; give the id of one of the images"),
        ({"image_id": 1.5}, r"image_id is 1\.5"),
        ({"image_id": True}, "image_id is true"),
        ({"image_id": "1"}, "image_id '1' of annotations is text where images have numbers"),
        ({"image_id": 99}, "name 1 unknown images"),
        ({"id": [7]}, r"annotations\[0\]: id is a list of 1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_annotation(tmp_path, change, message):
    file = written(tmp_path, content(person(**change)))
    with pytest.raises(UserError, match=message) as caught:
        load_annotations(file)
    assert str(file) in str(caught.value)


def test_boxes_outside_of_their_images_are_left_out(tmp_path, capsys):
    hidden = {"keypoints": [0, 0, 0] * 17, "num_keypoints": 0}
    boxes = [[5, 6, 50, 60], [-50, 6, 50, 60], [5, -60, 50, 60], [90, 6, 50, 60], [5, 80, 50, 60]]
    listed = [person(id=n, bbox=box, **hidden) for n, box in enumerate(boxes)]
    listed += [person(id=8, bbox=[-50, 6, 20, 20], area=None), person(id=9, bbox=[-5, -5, 10, 10])]
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((80, 90, 3), np.uint8))
    file = written(tmp_path, content(*listed))
    data = Coco(tmp_path, file)
    assert data[0].boxes.xywh.tolist() == [[5, 6, 50, 60], [10, 12, 30, 40], [-5, -5, 10, 10]]
    assert data[0].truth.areas.tolist() == [900, 1200, 900]
    assert data.truth.areas.tolist() == [900, 1200, 900]
    assert data.table()["persons"].tolist() == [2]
    assert len(data.records[0]["annotations"]) == len(data.truth.crowd) == len(data.truth.visibility) == 3
    said = (
        "5 annotated boxes lie wholly outside their images, like [-50, 6, 50, 60] in image 1 of 80x90: 1 are made of the "
        "labelled keypoints instead, and 4 annotations without keypoints in the image are left out; give bbox as x, y, width"
    )
    assert f"{file}: {said}" in capsys.readouterr().err
    assert [doubt for doubt in data.doubts(tmp_path) if doubt.startswith(said)]
    part = data.only(["a.png"])
    assert len(part.records[0]["annotations"]) == 3
    assert [doubt for doubt in part.doubts(tmp_path) if doubt.startswith(said)]
    _ = Coco(tmp_path, file).truth
    assert not capsys.readouterr().err, "it is said once"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": "80"}, "image 1: height is the text '80', not a number of pixels; write it without quotes"),
        ({"width": 0}, "image 1: width is 0"),
        ({"width": -5}, "image 1: width is -5"),
        ({"width": 10**12}, "image 1: width is"),
        ({"height": None}, r"images\[0\] has no 'height'"),
        ({"id": [1]}, r"images\[0\]: id is a list of 1"),
        ({"id": 1.5}, r"images\[0\]: id is 1\.5"),
        ({"id": "a\x00b"}, r"images\[0\]: id is the text"),
        ({"file_name": 5}, "image 1: file_name is 5, not text"),
        ({"file_name": "images\\a.png"}, "image 1: file_name .* holds a backslash; write the path with /"),
        ({"file_name": "../a.png"}, "image 1: file_name '../a.png' is no relative path that stays inside"),
        ({"file_name": "b/../../a.png"}, "no relative path that stays inside"),
        ({"file_name": "/etc/a.png"}, "no relative path that stays inside"),
        ({"file_name": ""}, "no relative path that stays inside"),
        ({"file_name": "a\x00.png"}, "no relative path that stays inside"),
        ({"flickr_url": 5}, "image 1: flickr_url is 5, not text"),
    ],
)
def test_a_wrong_image_record_is_refused_with_its_id(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_annotations(written(tmp_path, content(person(), **change)))


def test_images_below_folders_and_words_as_ids_are_read(tmp_path):
    raw = content(person(image_id="x/../y"), id="x/../y", file_name="a..b/c d/é.png")
    data = Coco(tmp_path, written(tmp_path, raw))
    assert data.records[0]["file_name"] == "a..b/c d/é.png"
    assert data[0].id == "x/../y"


def test_a_mark_of_utf8_is_read_and_utf16_named(tmp_path):
    text = json.dumps(content(person()))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load_annotations(tmp_path / "a.json").people) == 1
    (tmp_path / "a.json").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.json: it is written in UTF-16 or UTF-32; save it as UTF-8"):
        load_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("words", None),
        ([[1, 2, 3]], None),
        ([[1, 2, "3", 4]], None),
        ([1, 2, 3, 4], None),
        ({"size": [4, 4], "counts": [3, 3]}, None),
        ({"size": [10**6, 10**6], "counts": [10**12]}, None),
        ({"size": [4, 4], "counts": "\x01\x02"}, None),
        ({"size": [4, 4], "counts": [20, -4]}, None),
        ([], [None]),
        ([[1, 2, 3, 4, 5, 6], []], [[[1, 2, 3, 4, 5, 6]]]),
        ({"size": [4, 4], "counts": [6, 10]}, [{"size": [4, 4], "counts": [6, 10]}]),
    ],
)
def test_segmentations_are_checked(tmp_path, shape, expected):
    data = Coco(tmp_path, written(tmp_path, content(person(segmentation=shape))))
    if expected is None:
        with pytest.raises(UserError, match="annotation 7: .*segmentation"):
            data[0].truth
    else:
        assert list(data[0].truth.masks) == expected


def test_compressed_run_lengths_are_those_of_pycocotools(tmp_path):
    from pycocotools.mask import encode

    mask = (np.random.default_rng(0).random((37, 53)) > 0.7).astype(np.uint8)
    packed = encode(np.asfortranarray(mask))
    shape = {"size": [37, 53], "counts": packed["counts"].decode()}
    (found,) = Coco(tmp_path, written(tmp_path, content(person(segmentation=shape))))[0].truth.masks
    pixels = np.repeat(np.arange(len(found["counts"])) % 2, found["counts"]).reshape(53, 37).T
    assert np.array_equal(pixels, mask)


# --- image files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (31, 47, 3), np.uint8)


def test_headers_say_what_decoders_find(tmp_path, pixels):
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6
    forms = {
        "plain.jpg": {}, "progressive.jpg": {"progressive": True}, "turned.jpg": {"exif": exif}, "plain.png": {},
        "turned.png": {"exif": exif}, "lossy.webp": {}, "lossless.webp": {"lossless": True}, "turned.webp": {"exif": exif},
        "plain.bmp": {},
    }  # fmt: skip
    for name, options in forms.items():
        picture.save(tmp_path / name, **options)
        header = read_header((tmp_path / name).read_bytes())
        assert (header.size.height, header.size.width) == (31, 47), name
        assert header.orientation == (6 if name.startswith("turned") else 1), name
        shown = shown_size(tmp_path / name)
        assert read_image(tmp_path / name, upright=True).shape[:2] == (shown.height, shown.width), name


@pytest.mark.parametrize("kind", [kind for kind in IMAGE_TYPES if kind != ".jpeg"])
def test_an_image_is_read_by_content_whatever_its_name_ends_with(tmp_path, pixels, kind):
    content = cv2.imencode(kind, pixels)[1].tobytes()
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a"):
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name).shape == (31, 47, 3), name


def folder_of(tmp_path, names, content):
    for name in names:
        (tmp_path / name).write_bytes(content(name))
    listed = [{"id": n, "file_name": name, "height": 31, "width": 47} for n, name in enumerate(names)]
    labelled = [person(id=n, image_id=n) for n in range(len(names))]
    file = written(tmp_path, {**content_of(), "images": listed, "annotations": labelled})
    part = {"images": tmp_path, "annotations": file}
    named = {"train": {"a": [names[0]]}, "tune": {"a": [names[1]]}, "validation": {"a": list(names[2:])}}
    (tmp_path / "splits.json").write_text(json.dumps(named))
    return lambda strict: CocoSplits(part, part, None, str(tmp_path / "splits.json"), str(tmp_path / "cache"), strict)


def content_of():
    return content()


def test_broken_images_of_every_kind_are_named_and_can_be_skipped(tmp_path, pixels):
    def damage(name):
        whole = cv2.imencode("." + name.split(".")[-1], np.roll(pixels, sum(name.encode()) % 47, 0))[1].tobytes()
        if name.startswith("short"):
            return whole[: len(whole) // 2]
        return whole[:80] + bytes(40) + whole[120:] if name.startswith("zeroed") else whole

    good = ["0.png", "1.png", "2.png", "3.jpg"]
    bad = ["short.png", "zeroed.png", "short.webp", "short.bmp", "short.jpg", "zeroed.webp"]
    splits = folder_of(tmp_path, good + bad, damage)
    with pytest.raises(UserError, match=r"images are missing or not whole, of .*short\.png \(not a whole image\)"):
        splits(True).open("validation")
    loose = splits(False)
    kept = [r["file_name"] for r in loose.open("validation").records]
    assert set(kept) >= {"2.png", "3.jpg"}
    assert not set(kept) & {"short.png", "zeroed.png", "short.webp", "short.bmp", "short.jpg"}
    for n in range(len(kept)):
        assert loose.open("validation")[n].read().shape == (31, 47, 3)


def test_pipes_devices_and_folders_are_no_images(tmp_path, pixels):
    splits = folder_of(tmp_path, ["0.png", "1.png", "2.png", "pipe.png", "null.png", "folder.png"], lambda name: name.encode())
    for n in range(3):
        cv2.imwrite(str(tmp_path / f"{n}.png"), np.roll(pixels, n, 0))
    for name in ("pipe.png", "null.png", "folder.png"):
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"3 images .*folder\.png \(not a regular file\)|3 images .*pipe\.png \(not a reg"):
        splits(True).open("validation")
    for name in ("pipe.png", "null.png", "folder.png"):
        with pytest.raises(UserError, match=f"{name}: cannot read the image \\((not a regular file|Is a directory)\\)"):
            read_image(tmp_path / name)
        with pytest.raises(UserError, match="cannot read it"):
            load_annotations(tmp_path / name)
    loose = splits(False)
    assert [r["file_name"] for r in loose.open("validation").records] == ["2.png"]
    assert loose.dropped["validation"] == ["folder.png", "null.png", "pipe.png"]


def test_a_small_record_does_not_decode_a_vast_image(tmp_path, monkeypatch):
    Image.new("L", (9000, 9000)).save(tmp_path / "a.png")
    decoded = []
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoded.append(1))
    data = Coco(tmp_path, written(tmp_path, content(person())))
    with pytest.raises(UserError, match="9000x9000 pixels, but its annotations say 80x90"):
        data[0].read()
    with pytest.raises(UserError, match="9000x9000 pixels, but its annotations say 80x90"):
        data.contents(tmp_path / "cache")
    assert shown_size(tmp_path / "a.png").height == 9000
    assert not decoded


def test_an_orientation_that_no_size_tells_is_said_and_can_be_chosen(tmp_path, pixels):
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(tmp_path / "a.png", exif=exif)
    file = written(tmp_path, content(person(keypoints=[10, 12, 2] * 17, bbox=[5, 6, 20, 20]), height=31, width=47))
    as_size = Coco(tmp_path, file)
    (said,) = as_size.doubts(tmp_path / "cache")
    assert said.startswith("EXIF turns or mirrors 1 images")
    assert "data.upright=true" in said
    assert np.array_equal(as_size[0].read(), pixels)
    assert np.array_equal(Coco(tmp_path, file, upright=False)[0].read(), pixels)
    assert np.array_equal(Coco(tmp_path, file, upright=True)[0].read(), pixels[::-1, ::-1])
    assert Coco(tmp_path, file, upright=True).doubts(tmp_path / "cache") == []


def test_images_of_one_number_in_two_forms_keep_apart(tmp_path, pixels):
    for n, name in enumerate(("1.png", "01.png")):
        cv2.imwrite(str(tmp_path / name), np.roll(pixels, n, 0))
    data = Coco(tmp_path)
    assert sorted(data[n].id for n in range(2)) == ["01.png", "1.png"]


# --- figures that are not believable ---------------------------------------------------------------------------------------


def measured(found=lambda points: points, labels=COCO_17, found_labels=COCO_17, images=12, **changes):
    """The doubts about people of whom an engine finds what `found` makes of the points."""
    draw = np.random.default_rng(0)
    metric = CocoKeypoints(labels, found_labels)
    K = len(labels.names)
    for n in range(images):
        points = draw.uniform(0, 200, (K, 2))
        record = person(keypoints=np.c_[points, np.full(K, 2)].ravel().tolist(), area=9000.0, num_keypoints=K)
        made = found(points)
        if "keypoints" in changes:
            record["keypoints"] = (np.c_[points / 200, np.full(K, 2)]).ravel().tolist()
        record |= {key: value for key, value in changes.items() if key != "keypoints"}
        poses = np.zeros((0 if made is None else 1, len(found_labels.names), 3), np.float32)
        if made is not None:
            poses[0, :K, :2], poses[..., 2] = made, 0.9
        metric.process(str(n), people([record], K), Poses(poses, np.full(len(poses), 0.9, np.float32)))
    return metric.doubts()


def test_believable_figures_are_not_doubted():
    assert measured() == []


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: measured(area=0.0), ["area is 0 for 12 of 12 people", "drop 'area'"]),
        (lambda: measured(lambda points: None), ["AP is 0.000", "0 people are predicted, 12 are", "decoder.*", "model.spec"]),
        (lambda: measured(lambda points: points[list(COCO_17.flip)]), ["with left and right exchanged", "model.spec.labels"]),
        (lambda: measured(lambda points: points[:, ::-1]), ["with x and y exchanged"]),
        (lambda: measured(lambda points: points + 900), ["may be untrained", "data.*.images with data.*.annotations"]),
        (lambda: measured(keypoints=True), ["may be fractions of the image's size"]),
    ],
)
def test_causes_of_an_implausible_figure_are_named(made, words):
    said = " | ".join(made())
    for word in words:
        assert word in said


def test_keypoints_that_no_output_has_are_named():
    names = ("nose", *(f"other_{n}" for n in range(16)))
    found = Skeleton(names, (), (0.05,) * 17)
    said = " | ".join(measured(found_labels=found))
    assert "no keypoint named like 16 of 17 of the annotations (left_eye, right_eye" in said
    assert f"the network has 17 keypoints ({', '.join(names)}), the data 17 ({', '.join(COCO_17.names)}); give" in said
    many = Skeleton((*COCO_17.names[1:], *(f"other_{n}" for n in range(9))), (), (0.05,) * 25)
    assert "network has 25 keypoints (left_eye, " in (said := " | ".join(measured(lambda p: 0, found_labels=many)))
    assert "other_3 and 5 more), the data 17 (nose, " in said


def test_labels_of_the_network_without_sigmas_are_said():
    assert measured() == []
    (said,) = measured(found_labels=Skeleton(COCO_17.names))
    assert "the network's labels have no sigmas, so agreement and the decoder take 0.05 for each of its 17 keypoints" in said
    assert "add sigmas: [...] to model.spec.labels" in said
