import json
import shutil

import numpy as np
import pytest

from pipeline.datasets import annotations
from pipeline.datasets.annotations import load_annotations
from pipeline.datasets.coco import SPLITS, CocoSplits
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.images import inspect_files
from pipeline.launch.preflight import check_images
from pipeline.results.stage import Stage
from posepress.errors import UserError
from posepress.image_headers import read_header
from posepress.images import read_image


@pytest.fixture
def folder(images, tmp_path):
    """A copy of a generated data set that can be damaged."""
    shutil.copytree(images.folder, tmp_path / "data")
    return tmp_path / "data"


def splits(folder, **options):
    train = {"images": folder / "images/train", "annotations": folder / "annotations/train.json"}
    val = {"images": folder / "images/validation", "annotations": folder / "annotations/validation.json"}
    loose = {"images": folder / "images/unlabelled"}
    made = {"splits": str(folder / "splits.json"), "cache": str(folder / "cache"), **options}
    return CocoSplits(train, val, loose, **made)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_samples_hold_their_labels(images):
    data = images.open("validation")
    sample = data[3]
    record = data.records[3]
    assert sample.read().shape == (120, 160, 3)
    assert len(sample.truth.keypoints) == len(record["annotations"])
    assert len(sample.boxes.xywh) == sum(not a["iscrowd"] for a in record["annotations"]), "a crowd is nobody to cut out"
    assert sample.truth.areas.tolist() == [a["area"] for a in record["annotations"]]
    table = data.table()
    assert table["persons"][3] == sum(a["num_keypoints"] > 0 for a in record["annotations"])
    assert len({len(column) for column in table.values()}) == 1


def test_a_missing_image_is_named_and_can_be_skipped(folder):
    names = sorted(f.name for f in (folder / "images/validation").iterdir())
    (folder / "images/validation" / names[2]).unlink()
    with pytest.raises(UserError, match=rf"1 images are missing or not whole, of \d+: {names[2]} \(missing\)"):
        splits(folder).open("validation")
    loose = splits(folder, strict=False)
    assert len(loose.open("validation")) == len(names) - 1
    assert loose.dropped["validation"] == [names[2]]


def test_a_corrupt_image_is_named_and_can_be_skipped(folder):
    file = min((folder / "images/validation").iterdir())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"1 images are missing or not whole, of \d+: {file.name} \(not a whole image\)"):
        splits(folder).open("validation")
    with pytest.raises(UserError, match=f"{file.name}: not a whole image"):
        read_image(file)
    assert len(splits(folder, strict=False).open("validation")) == len(list(file.parent.iterdir())) - 1


def test_a_truncated_jpeg_is_not_taken_for_whole(tmp_path):
    import cv2

    file = tmp_path / "a.jpg"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert read_image(file).shape == (64, 64, 3)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(UserError, match="not a whole image"):
        read_image(file)
    with pytest.raises(UserError, match="cannot read the image"):
        read_image(tmp_path / "none.jpg")


def test_an_image_of_another_size_than_its_record_is_refused(folder):
    edit(folder / "annotations/validation.json", lambda c: c["images"][0].update(height=99))
    with pytest.raises(
        UserError, match="120x160 pixels, but its annotations say 99x160.*set data.upright; or pass strict=false"
    ):
        splits(folder).open("validation")
    whole = Coco(folder / "images/validation", folder / "annotations/validation.json")
    with pytest.raises(UserError, match=r"say 99x160; .*correct height and width, or set data\.upright"):
        whole[0].read()
    loose = splits(folder, strict=False)
    assert len(loose.open("validation")) == len(whole) - 1
    assert loose.dropped["validation"] == [whole.records[0]["file_name"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\] has no 'file_name'"),
        ('{"images": [], "annotations": [{"id": 1}]}', r"annotations\[0\] has no 'image_id'"),
        (
            '{"images": [{"id": 1, "file_name": "a", "height": 1, "width": 1}],'
            '"annotations": [{"image_id": 7, "bbox": [0, 0, 2, 2]}]}',
            "name 1 unknown images",
        ),
    ],
)
def test_what_is_not_coco_is_refused(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_annotations(file)
    with pytest.raises(UserError, match="cannot read it"):
        load_annotations(tmp_path / "none.json")


def test_keypoints_of_another_skeleton_are_refused(folder):
    edit(folder / "annotations/validation.json", lambda c: c["annotations"][0].update(keypoints=[0] * 15))
    with pytest.raises(UserError, match="15 keypoint numbers, not 51"):
        splits(folder).open("validation")


def test_nobody_to_find_is_refused(folder):
    edit(folder / "annotations/validation.json", lambda c: c.update(annotations=[]))
    with pytest.raises(UserError, match="no person with keypoints in the split 'validation'"):
        splits(folder).open("validation")
    edit(folder / "annotations/validation.json", lambda c: c.update(images=[]))
    with pytest.raises(UserError, match="images it does not hold"):
        splits(folder).open("validation")
    whole = splits(folder, splits=None)
    with pytest.raises(UserError, match="no images for the split 'validation'"):
        whole.open("validation")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, None),
        (lambda folder: shutil.rmtree(folder / "images/train"), r"^data\.train\.images=.*train: no such folder"),
        (
            lambda folder: [file.unlink() for file in (folder / "images/validation").iterdir()],
            r"^data\.\w+: .*24 images are missing or not whole, of 24",
        ),
        (
            lambda folder: edit(folder / "annotations/validation.json", lambda c: c.update(images=[], annotations=[])),
            r"^data\.val: .*validation\.json: no images for the split 'validation'",
        ),
    ],
)
def test_given_images_are_checked_before_any_work(folder, damage, message):
    damage(folder)
    part = {name: {"images": f"{folder}/images/{name}", "annotations": f"{folder}/annotations/{name}.json"} for name in SPLITS}
    given = {"_target_": "pipeline.datasets.coco.CocoSplits", "train": part["train"], "val": part["validation"]}
    given |= {"unlabelled": {"images": None}, "splits": None, "cache": f"{folder}/cache"}
    reads = {"sample": ("train",), "export": (), "evaluate": ("validation", "agreement")}
    stages = {name: Stage(name, "", {"data": given}, splits=split) for name, split in reads.items()}
    if message is None:
        check_images(stages, list(stages))
        return
    with pytest.raises(UserError, match=message):
        check_images(stages, list(stages))
    check_images(stages, ["export"])  # which reads none


def test_splits_that_share_an_image_are_refused(folder):
    named = json.loads((folder / "splits.json").read_text())
    named["tune"]["synthetic"].append(named["train"]["synthetic"][0])
    (folder / "splits.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match="is in 'train' and 'tune'"):
        splits(folder).open("validation")


def test_splits_that_share_content_are_refused(folder):
    train, validation = (sorted((folder / "images" / kind).iterdir()) for kind in ("train", "validation"))
    shutil.copyfile(train[0], validation[0])
    with pytest.raises(UserError, match=f"{validation[0].name} of 'validation' has the same content as {train[0].name}"):
        splits(folder).open("train")


def test_bad_splits_files_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="cannot read it.*check data.splits"):
        splits(folder, splits=str(tmp_path / "none.json")).open("train")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        splits(folder, splits=str(tmp_path / "broken.json")).open("train")
    (tmp_path / "few.json").write_text('{"train": {"a": "all"}}')
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="not a splits file but a list"):
        splits(folder, splits=str(tmp_path / "list.json")).open("train")
    with pytest.raises(UserError, match="no images for 'tune'"):
        splits(folder, splits=str(tmp_path / "few.json")).open("train")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        splits(folder).open("validatoin")


def test_names_that_no_list_holds_are_refused(folder):
    named = json.loads((folder / "splits.json").read_text())
    named["train"]["synthetic"].append("typo.png")
    (folder / "splits.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match=r"splits\.json: train names 1 images that are neither in .*train\.json nor in .*typo"):
        splits(folder).open("train")
    loose = splits(folder, strict=False)
    loose.open("unlabelled")
    assert loose.dropped["unlabelled"] == ["typo.png"]
    del named["train"]["unlabelled"], named["agreement"]
    (folder / "splits.json").write_text(json.dumps(named))
    labelled = splits(folder)
    alone = CocoSplits(labelled.train, labelled.val, None, labelled.splits, labelled.cache)
    with pytest.raises(UserError, match=r"train\.json: the splits name 1 images it does not hold: typo\.png"):
        alone.open("train")


@pytest.mark.parametrize(("key", "meant"), [("validaton", "validation"), ("agreemnt", "agreement"), ("Train", "train")])
def test_keys_of_a_splits_file_near_a_splits_name_are_refused(folder, key, meant):
    named = json.loads((folder / "splits.json").read_text())
    (folder / "splits.json").write_text(json.dumps({**named, "info": 1, "annotations": [], "description": "", "val": 2}))
    splits(folder).open("validation")
    (folder / "splits.json").write_text(json.dumps({**named, key: named[meant]}))
    with pytest.raises(UserError, match=f"splits.json: '{key}' is no split; rename it to '{meant}'"):
        splits(folder).open("validation")


def test_names_of_unlabelled_images_are_no_ids(folder):
    number = splits(folder).open("train").records[0]["id"]
    free = min((folder / "images/unlabelled").iterdir())
    name = f"{number:012d}.jpeg"
    free.rename(free.with_name(name))
    named = json.loads((folder / "splits.json").read_text())
    for split in ("train", "agreement"):
        for group, names in named[split].items():
            named[split][group] = [name if n == free.name else n for n in names]
    (folder / "splits.json").write_text(json.dumps(named))
    data = splits(folder)
    assert str(number) in {r["id"] for split in ("unlabelled", "agreement") for r in data.open(split).records}
    train = min((folder / "images/train").iterdir())
    shutil.copyfile(train, free.with_name(name))
    with pytest.raises(UserError, match="has the same content as"):
        splits(folder).open("train")


def test_without_a_splits_file_the_tune_images_come_from_the_train_images(folder):
    data = splits(folder, splits=None)
    train, tune = ({r["file_name"] for r in data.open(s).records} for s in ("train", "tune"))
    assert len(tune) == 1
    assert not train & tune
    assert len(data.open("agreement")) == len(data.open("unlabelled")) == 2


def test_labels_without_areas_and_counts_are_counted(folder):
    def strip(content):
        for annotation in content["annotations"]:
            annotation.pop("num_keypoints")
            annotation.pop("area")

    expected = splits(folder).open("validation").table()
    edit(folder / "annotations/validation.json", strip)
    found = splits(folder).open("validation").table()
    assert (found["persons"] == expected["persons"]).all()
    assert (found["area"] >= expected["area"]).all()


def test_the_digest_follows_content_and_labels(folder):
    before = splits(folder).digest(["validation"])
    assert splits(folder).digest(["validation"]) == before
    edit(folder / "annotations/validation.json", lambda c: c["annotations"][0].update(area=1.0))
    relabelled = splits(folder).digest(["validation"])
    file = min((folder / "images/validation").iterdir())
    file.write_bytes(file.read_bytes()[:2] + file.read_bytes()[2:] + b"\0")
    assert len({before, relabelled, splits(folder).digest(["validation"])}) == 3


def test_a_missing_folder_is_named(tmp_path):
    data = CocoSplits({"images": tmp_path / "none"}, {"images": tmp_path / "none"}, cache=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.train\.images=.*no such folder"):
        data.open("train")


def test_unlabelled_images_need_no_annotations(images):
    data = Coco(images.folder / "images" / "unlabelled")
    assert len(data) == 4
    assert data[0].truth is None
    assert data[0].size.height == 120


@pytest.mark.real
def test_the_real_splits_are_as_large_as_they_should_be(real):
    sizes = {split: len(real.open(split)) for split in ("train", "unlabelled", "tune", "agreement", "validation")}
    assert sizes == {"train": 40, "unlabelled": 126, "tune": 30, "agreement": 125, "validation": 72}


# --- what images can be ----------------------------------------------------------------------------------------------------


def test_grey_sixteen_bit_cmyk_and_transparent_files_are_read_as_rgb(tmp_path):
    import cv2
    from PIL import Image

    draw = np.random.default_rng(0)
    smooth = cv2.resize(draw.integers(0, 255, (6, 8, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
    grey = smooth[..., 0]
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 257)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(np.dstack([smooth, np.full((48, 64), 9, np.uint8)])).save(tmp_path / "clear.png")
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(read_image(tmp_path / name), np.repeat(grey[..., None], 3, axis=2)), name
    assert np.array_equal(read_image(tmp_path / "clear.png"), smooth)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - smooth).mean() < 12


def turned(file, orientation):
    """A JPEG whose EXIF says that it was taken with the camera turned."""
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, exif=exif, quality=95)


def test_exif_orientation_follows_the_annotations(tmp_path):
    turned(tmp_path / "a.jpg", 6)
    assert read_image(tmp_path / "a.jpg").shape == (40, 60, 3)
    assert read_image(tmp_path / "a.jpg", upright=True).shape == (60, 40, 3)

    def annotated(height, width):
        record = {"id": 1, "file_name": "a.jpg", "height": height, "width": width}
        (tmp_path / "a.json").write_text(json.dumps({"images": [record], "annotations": []}))
        return Coco(tmp_path, tmp_path / "a.json")[0].read()

    assert annotated(40, 60).shape == (40, 60, 3)
    assert np.array_equal(annotated(60, 40), read_image(tmp_path / "a.jpg", upright=True))
    with pytest.raises(UserError, match="they do not belong together"):
        annotated(50, 50)
    assert Coco(tmp_path)[0].size.height == 60, "without labels an image is seen as it is shown"


def test_an_image_above_a_hundred_megapixels_is_refused(tmp_path):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    Image.new("L", (10100, 10000)).save(tmp_path / "vast.png")
    with pytest.raises(UserError, match=r"vast\.png.*100"):
        read_image(tmp_path / "vast.png")


def test_a_skeleton_of_its_own_without_sigmas_takes_the_default_and_says_so(folder, tmp_path):
    from evaluation.metrics.coco_keypoints import CocoKeypoints

    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear"]

    def five(content, **more):
        for annotation in content["annotations"]:
            annotation["keypoints"] = annotation["keypoints"][:15]
        content["categories"] = [{"id": 1, "name": "face", "keypoints": names, "skeleton": [[1, 2]], **more}]

    edit(folder / "annotations/validation.json", five)
    data = splits(folder).open("validation")
    (said,) = [doubt for doubt in data.doubts(tmp_path) if "sigmas" in doubt]
    assert "the category face has no sigmas, so OKS takes 0.05 for each of its 5 keypoints; add" in said
    assert data.labels.names == tuple(names)
    assert data.labels.flip == (0, 2, 1, 4, 3)
    assert data[0].truth.keypoints.shape[1] == 5
    assert CocoKeypoints(data.labels, data.labels).people().sigmas.tolist() == [0.05] * 5
    known = splits(folder, skeleton={"names": names, "edges": [[0, 1]], "sigmas": [0.01] * 5, "mirror": [[3, 4]]}).open(
        "validation"
    )
    assert known.labels.sigmas == (0.01,) * 5
    assert known.labels.flip == (0, 1, 2, 4, 3)
    assert known.labels.limbs == ((0, 1),)
    assert not [doubt for doubt in known.doubts(tmp_path) if "sigmas" in doubt]
    edit(folder / "annotations/validation.json", lambda c: c["categories"][0].update(sigmas=[0.03] * 5))
    assert CocoKeypoints(splits(folder).open("validation").labels, data.labels).evaluate()["ap"] == -1


FACE = ["nose", "left_eye", "right_eye", "mole", "scar"]


def faces(folder, **category):
    """Labels of five keypoints of a face, of which mirror pairs are known to a file only."""

    def five(content):
        for annotation in content["annotations"]:
            annotation["keypoints"] = annotation["keypoints"][:15]
        content["categories"] = [{"id": 1, "name": "face", "keypoints": FACE, **category}]

    edit(folder / "annotations/validation.json", five)


@pytest.mark.parametrize(
    ("given", "flip", "limbs", "sigmas"),
    [
        ({"names": FACE, "mirror": [[1, 2], [3, 4]], "edges": [[0, 1]]}, (0, 2, 1, 4, 3), ((0, 1),), 0.03),
        ({"names": FACE[::-1], "mirror": [[3, 2], [1, 0]], "edges": [[4, 3]]}, (0, 2, 1, 4, 3), ((0, 1),), 0.03),
        ({"names": ["chin", *FACE[3:]], "mirror": [[1, 2]], "edges": [[0, 1], [1, 2]]}, (0, 2, 1, 4, 3), ((3, 4),), 0.03),
        ({"names": FACE, "mirror": [[1, 3]], "sigmas": [0.2] * 5}, (0, 3, 2, 1, 4), (), 0.03),
        ("coco_17", (0, 2, 1, 3, 4), ((1, 2), (0, 1), (0, 2)), 0.03),
        ("hand_21", (0, 2, 1, 3, 4), (), 0.03),
    ],
)
def test_mirror_pairs_of_a_file_are_taken_by_name_beside_sigmas_of_the_category(folder, given, flip, limbs, sigmas):
    faces(folder, sigmas=[sigmas] * 5)
    labels = splits(folder, skeleton=given).open("validation").labels
    assert (labels.names, labels.flip, labels.limbs, labels.sigmas) == (tuple(FACE), flip, limbs, (sigmas,) * 5)


def test_sigmas_of_a_file_are_taken_by_name(folder, tmp_path):
    faces(folder, skeleton=[[4, 5]])
    given = {"names": FACE[::-1], "mirror": [[1, 0]], "edges": [[4, 3]], "sigmas": [0.1, 0.2, 0.3, 0.4, 0.5]}
    data = splits(folder, skeleton=given).open("validation")
    assert data.labels.sigmas == (0.5, 0.4, 0.3, 0.2, 0.1)
    assert data.labels.flip == (0, 1, 2, 4, 3), "the file names all pairs"
    assert data.labels.limbs == ((3, 4),), "the category's own limbs stay"
    assert not [doubt for doubt in data.doubts(tmp_path) if "sigmas" in doubt]


def test_a_ground_truth_without_persons_is_refused_and_has_no_figure(folder):
    from evaluation.metrics.coco_keypoints import CocoKeypoints
    from posepress.results import Poses

    edit(folder / "annotations/validation.json", lambda c: c.update(annotations=[]))
    with pytest.raises(UserError, match=r"validation\.json: no person with keypoints in the split 'validation'"):
        splits(folder).open("validation")
    data = Coco(folder / "images/validation", folder / "annotations/validation.json")
    metric = CocoKeypoints(data.labels, data.labels)
    for n in range(len(data)):
        metric.process(data[n].id, data[n].truth, Poses(np.ones((1, 17, 3), np.float32), np.ones(1, np.float32)))
    assert metric.evaluate()["ap"] == -1
    assert metric.details()["errors"]["background"] == 1


def test_a_phones_trailer_and_a_wrong_suffix_do_not_matter(tmp_path):
    import cv2

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole + b"a short film" * 1000)
    assert read_image(tmp_path / "a.jpg").shape == (64, 64, 3)
    cv2.imwrite(str(tmp_path / "b.png"), pixels)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.png").read_bytes())
    assert np.array_equal(read_image(tmp_path / "b.jpg"), pixels[..., ::-1])
    thumbnail = b"\xff\xe1" + (len(whole) + 2).to_bytes(2, "big") + whole if len(whole) < 65000 else b""
    (tmp_path / "c.jpg").write_bytes(whole[:2] + thumbnail + whole[2:-600])
    with pytest.raises(UserError, match="not a whole image"):
        read_image(tmp_path / "c.jpg")


def test_fill_bytes_before_a_marker_do_not_matter(tmp_path):
    import cv2

    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels)
    whole, expected = (tmp_path / "a.jpg").read_bytes(), read_image(tmp_path / "a.jpg")
    tables = whole.index(b"\xff\xdb")
    for at in (2, tables, whole.index(b"\xff\xda")):
        filled = whole[:at] + b"\xff\xff" + whole[at:]
        (tmp_path / "a.jpg").write_bytes(filled)
        assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
        assert str(read_header(filled).size) == "40x64"
        assert not inspect_files(tmp_path, ["a.jpg"], tmp_path / "cache").wrong
        (tmp_path / "a.jpg").write_bytes(filled[:-600])
        assert inspect_files(tmp_path, ["a.jpg"], tmp_path / "cache").wrong == {"a.jpg": "not a whole image"}
    for cut in (2, 3, 4, 5, tables + 3):
        (tmp_path / "a.jpg").write_bytes(whole[:cut])
        assert inspect_files(tmp_path, ["a.jpg"], tmp_path / "cache").wrong == {"a.jpg": "not a whole image"}


GOOD = [1, 1, "0" * 64, 3, 4, 1, False]


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "[" * 100_000,
        "7",
        "null",
        b"\xff\xfe",
        {"a.png": 1},
        {"a.png": []},
        *({"a.png": [*GOOD[:n], wrong, *GOOD[n + 1 :]]} for n, wrong in enumerate(["1", None, 5, None, "4", 9, None])),
        {"a.png": [*GOOD[:2], "short", *GOOD[3:]]},
        {"a.png": [*GOOD[:3], -3, *GOOD[4:]]},
    ],
)
def test_a_damaged_list_of_digests_is_none(damage, tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((3, 4, 3), np.uint8))
    expected = inspect_files(tmp_path, ["a.png"], tmp_path / "cache")
    (index,) = (tmp_path / "cache/digests").iterdir()
    if isinstance(damage, dict):  # of the file as it is, so that size and time do not tell
        true = json.loads(index.read_text())["a.png"]
        entry = damage["a.png"]
        if isinstance(entry, list) and entry:
            entry = [true[n] if value == GOOD[n] else value for n, value in enumerate(entry)]
        damage = json.dumps({"a.png": entry})
    index.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert inspect_files(tmp_path, ["a.png"], tmp_path / "cache") == expected
    assert json.loads(index.read_text())["a.png"][2] == expected.digests["a.png"]


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
def test_large_annotation_files_are_read_in_pieces_and_alike(layout, tmp_path, monkeypatch):
    polygon = [[1.5, 2, 3e1, -4.25, 5, 6], [7, 8, 9, 10, 11, 12]]
    runs = {"counts": [3, 4, 5], "size": [3, 4]}
    person = {"keypoints": [1, 2, 2] * 17, "num_keypoints": 17, "area": 5.5, "bbox": [1, 2, 3, 4.5], "category_id": 1}
    raw = {
        "info": {"annotations": "none", "note": "a } , { b"},
        "annotations": [
            {**person, "id": n, "image_id": n % 7, "iscrowd": n % 2, "segmentation": runs if n % 2 else polygon}
            for n in range(40)
        ],
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 9, "width": 9} for n in range(7)],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(raw, **layout))
    monkeypatch.setattr(annotations, "_PIECE", 500)
    taken = annotations._in_pieces((tmp_path / "a.json").read_bytes(), lambda raw: annotations._Kept(None, None, tmp_path))
    assert taken is not None
    assert len(taken[0]["images"]) == 7
    assert len(taken[1].columns) > 3
    found = load_annotations(tmp_path / "a.json")
    assert [a["id"] for a in found.people] == list(range(40))
    masks = annotations.people(found.people).masks
    assert masks[0] == polygon
    assert masks[1] == runs


def test_another_list_of_that_name_is_no_trap(tmp_path):
    raw = {"info": {"annotations": [{"a": 1}]}, "images": [{"id": 1, "file_name": "1", "height": 1, "width": 1}]}
    raw["annotations"] = [{"id": 5, "image_id": 1, "bbox": [0, 0, 1, 1]}]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    assert load_annotations(tmp_path / "a.json").people == raw["annotations"]


def test_an_image_id_that_is_there_twice_is_refused_and_words_are_ids_too(tmp_path):
    image = {"file_name": "1", "height": 1, "width": 1}
    person = {"bbox": [0, 0, 5, 5], "image_id": "one", "keypoints": [1, 1, 2] * 17}
    (tmp_path / "a.json").write_text(json.dumps({"images": [{**image, "id": "one"}], "annotations": [person, {**person}]}))
    assert Coco(tmp_path, tmp_path / "a.json").table()["persons"].tolist() == [2]
    twice = {"images": [{**image, "id": 7}, {**image, "id": "7"}], "annotations": []}
    (tmp_path / "b.json").write_text(json.dumps(twice))
    with pytest.raises(UserError, match="b.json: the image id 7 is there twice"):
        load_annotations(tmp_path / "b.json")


def test_people_without_keypoints_do_not_count_in_strata(tmp_path):
    image = {"file_name": "1", "height": 1, "width": 1, "id": 1}
    people = [
        {"image_id": 1, "bbox": [0, 0, 5, 5]},
        {"image_id": 1, "bbox": [0, 0, 5, 5], "keypoints": [0, 0, 0] * 17},
        {"image_id": 1, "bbox": [0, 0, 5, 4], "keypoints": [1, 1, 2] * 10 + [1, 1, 1] * 7, "area": 12.0},
        {"image_id": 1, "bbox": [0, 0, 5, 5], "keypoints": [1, 1, 2] * 17, "iscrowd": 1},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": people}))
    table = Coco(tmp_path, tmp_path / "a.json").table()
    assert table["persons"].tolist() == [1]
    assert table["area"].tolist() == [12.0]
    assert table["keypoints"].tolist() == [10]
    assert table["coverage"].tolist() == pytest.approx([10 / 17])
