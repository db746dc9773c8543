import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib_samplers.coverage import Coverage
from calib_samplers.stratified import Stratified, allocate, strata
from tests.conftest import pipeline, refused


def table(persons, areas=None, keypoints=None, coverage=None):
    n = len(persons)
    return {
        "id": np.array([str(i) for i in range(n)]),
        "file_name": np.array([f"{i}.jpg" for i in range(n)]),
        "persons": np.array(persons),
        "area": np.array(areas if areas is not None else [5000.0] * n),
        "keypoints": np.array(keypoints if keypoints is not None else [17.0] * n),
        "coverage": np.array(coverage if coverage is not None else [1.0] * n),
    }


def test_strata_of_a_table_made_by_hand():
    data = table([1, 2, 4, 5, -1], [100.0, 1024.0, 9215.0, 9216.0, 0], [1.0, 5.9, 6.0, 12.0, 0], [0.5, 0.6, 0.9, 1.0, 0])
    expected = ["1/small/few/part", "2-4/medium/few/much", "2-4/medium/some/much", "5+/large/most/all", "unlabelled"]
    assert strata(data).tolist() == expected
    assert strata(data, ["persons"]).tolist() == ["1", "2-4", "2-4", "5+", "unlabelled"]
    assert strata(data, []).tolist() == ["all"] * 4 + ["unlabelled"]


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 40), min_size=1), st.data())
def test_quotas_add_up_and_are_never_more_than_there_is(sizes, data):
    count = data.draw(st.integers(1, sum(sizes.values())))
    for allocation in ("proportional", "square_root", "equal"):
        quota = allocate(sizes, count, allocation)
        assert sum(quota.values()) == count
        assert all(0 <= quota[name] <= size for name, size in sizes.items())
    proportional = allocate(sizes, count)
    for name, size in sizes.items():
        exact = count * size / sum(sizes.values())
        assert np.floor(exact) <= proportional[name] <= np.ceil(exact)


def test_bins_are_the_users():
    own = {"persons": {"none": 0, "some": 1, "crowd": 4}}
    sampler = Stratified(num_images=4, columns=["persons"], bins=own, min_persons_per_image=0)
    assert set(sampler.sample(table([0, 1, 3, 4, 9])).strata) == {"none", "some", "crowd"}
    assert Stratified.label_of({"num_images": 4, "seed": 0, "bins": own}, {}).startswith("4-b.")
    assert Stratified.label_of({"num_images": 4, "seed": 0}, {}) == "4-s0"
    for wrong in ({"persons": {"a": 1, "b": 1}}, {"persons": {}}):
        with pytest.raises(ValueError, match=r"sampler\.bins\.persons=.*in rising order"):
            Stratified(columns=["persons"], bins=wrong)
    with pytest.raises(ValueError, match=r"sampler\.columns=\[area\]: choose some of persons"):
        Stratified(columns=["area"], bins=own)


def test_allocations_of_known_strata():
    sizes = {"a": 100, "b": 25, "c": 4}
    assert allocate(sizes, 34, "square_root") == {"a": 20, "b": 10, "c": 4}
    assert allocate(sizes, 30, "equal") == {"a": 13, "b": 13, "c": 4}, "what c lacks the others get"
    assert allocate(sizes, 13) == {"a": 10, "b": 3, "c": 0}, "the remainder goes to the largest fraction"


def test_quotas_are_met_and_a_seed_gives_one_choice():
    data = table([1] * 50 + [3] * 30 + [7] * 20)
    chosen = Stratified(20, seed=3).sample(data)
    assert {n.split("/")[0]: q["met"] for n, q in chosen.quotas.items()} == {"1": 10, "2-4": 6, "5+": 4}
    assert all(q["asked"] == q["met"] for q in chosen.quotas.values())
    assert len(set(chosen.ids)) == 20
    assert [data["file_name"][row] for row in chosen.rows] == list(chosen.file_names)
    assert chosen.digest == Stratified(20, seed=3).sample(data).digest
    assert chosen.ids != Stratified(20, seed=4).sample(data).ids


def test_a_uniform_draw_knows_no_strata():
    data = table([1] * 90 + [7] * 10)
    assert set(Stratified(20, columns=[]).sample(data).quotas) == {"all"}


def test_images_with_few_people_or_keypoints_are_not_eligible_but_unlabelled_ones_are():
    data = table([0, 1, 2, 3, -1], keypoints=[0.0, 3.0, 17.0, 17.0, 0.0])
    assert Stratified(4).sample(data).ids == ("1", "2", "3", "4")
    assert Stratified(3, min_kpts_per_person=5).sample(data).ids == ("2", "3", "4")
    assert Stratified(2, min_persons_per_image=3).sample(data).ids == ("3", "4")
    every = Stratified(5, min_persons_per_image=0, min_kpts_per_person=0).sample(data)
    assert every.ids == ("0", "1", "2", "3", "4")
    assert every.strata[0].startswith("0/"), "nobody is not one small person"


def test_too_few_images_are_an_error_that_lists_the_strata():
    words = r"num_images=9: only 3 images are eligible \(1/medium/most/all: 2, 2-4/medium/most/all: 1\)"
    with pytest.raises(ValueError, match=words):
        Stratified(9).sample(table([1, 1, 2, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_images": "abc"}, "num_images=abc"),
        ({"seed": "abc"}, "seed=abc: choose 0 or more, a whole number"),
        ({"seed": -1}, "seed=-1: choose 0 or more"),
        ({"min_persons_per_image": "abc"}, "min_persons_per_image=abc: choose 0 or more"),
        ({"min_kpts_per_person": None}, "min_kpts_per_person=None: choose 0 or more"),
        ({"allocation": "even"}, "allocation=even: choose proportional, square_root, equal|allocation=even"),
        ({"columns": ["size"]}, r"columns=\[size\]: choose some of persons, area, keypoints, coverage"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stratified(**options)
    if "allocation" not in options and "columns" not in options:
        with pytest.raises(ValueError, match=message):
            Coverage(**options)


def test_coverage_takes_the_corners_before_the_middle():
    draw = np.random.default_rng(0)
    middle = draw.normal(0, 0.05, (60, 2))
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1.0]])
    data = {**table([1] * 64), "features": np.concatenate([middle, corners])}
    for seed in range(5):
        chosen = Coverage(5, seed=seed).sample(data)
        assert {60, 61, 62, 63} <= set(chosen.rows)
    assert Coverage(5, seed=1).sample(data).digest == Coverage(5, seed=1).sample(data).digest


def test_coverage_refuses_a_count_that_is_none():
    with pytest.raises(ValueError, match="max_candidates=abc: choose a whole number"):
        Coverage(5, max_candidates="abc")


def test_coverage_looks_at_so_many_images_and_no_more():
    data = {**table([1] * 50), "features": np.full((50, 3), np.nan)}
    sampler = Coverage(4, max_candidates=10, seed=2)
    rows = sampler.candidates(data)
    assert len(rows) == 10
    data["features"][rows] = np.random.default_rng(0).normal(size=(10, 3))
    assert set(sampler.sample(data).rows) <= set(rows.tolist())


WORDS = ["experiment=smoke", "tracking=none", "precision=int8"]


@pytest.mark.parametrize("words", [["sampler=uniform"], ["sampler=coverage"], ["sampler.allocation=equal"]])
def test_every_sampler_leaves_a_list_and_its_pictures(words, smoke):
    pipeline(*WORDS, *words, "stage=sample", "sampler.num_images=6", cwd=smoke, check=0)
    label = {"uniform": "uniform-6-s0", "coverage": "coverage-6-s0", "equal": "stratified-6-equal-s0"}[words[0].split("=")[1]]
    (folder,) = (smoke / "outputs" / "smoke" / "sample").glob(f"*{label}")
    content = json.loads((folder / "calibration.json").read_text())
    assert len(content["images"]) == 6
    assert {"id", "file_name", "split", "stratum", "sha256"} == set(content["images"][0])
    assert sum(q["met"] for q in content["quotas"].values()) == 6
    assert cv2.imread(str(folder / "strata.png")).shape[0] > 50
    assert cv2.imread(str(folder / "contact_sheet.jpg")).shape[1] == 6 * 160
    first = (folder / "calibration.json").read_bytes()
    pipeline(*WORDS, *words, "stage=sample", "sampler.num_images=6", "force=true", cwd=smoke, check=0)
    assert (folder / "calibration.json").read_bytes() == first


def noise(where, count):
    """A folder of images that nobody labelled."""
    folder = where / "mine"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for n in range(count):
        cv2.imwrite(str(folder / f"own{n}.png"), draw.integers(0, 255, (90, 100, 3), np.uint8))
    return folder


def test_images_of_a_plain_folder_calibrate_too(smoke, tmp_path):
    folder = noise(tmp_path, 5)
    words = [*WORDS, f"sampler.image_dir={folder}", "sampler.num_images=5"]
    pipeline(*words, "stage=[sample,quantize]", cwd=smoke, check=0)
    content = json.loads((smoke / "outputs/smoke/sample/stratified-5-dir-s0/calibration.json").read_text())
    assert {(i["split"], i["stratum"]) for i in content["images"]} == {("image_dir", "unlabelled")}
    cv2.imwrite(str(folder / "own0.png"), np.zeros((90, 100, 3), np.uint8))
    assert "own0.png changed since it was chosen" in refused(pipeline(*words, "stage=quantize", "force=true", cwd=smoke))
    absent = pipeline(*WORDS, "sampler.image_dir=nowhere", "stage=sample", cwd=smoke)
    assert "image_dir=nowhere: no such folder" in refused(absent)


def test_a_validation_image_is_refused_by_its_content(smoke, tmp_path):
    import shutil

    annotations = next((smoke / "outputs" / "cache" / "synthetic").rglob("*val*.json"))
    images = json.loads(annotations.read_text())["images"]
    source = next((smoke / "outputs" / "cache" / "synthetic").rglob(images[0]["file_name"]))
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copyfile(source, folder / "copy.jpg")
    done = pipeline(*WORDS, f"sampler.image_dir={folder}", "sampler.num_images=1", "stage=sample", cwd=smoke)
    assert "has the content of the validation image" in refused(done)


def test_an_image_with_the_id_of_a_validation_image_is_refused(images, tmp_path):
    from pipeline.results.job import Job
    from pipeline.stages.sample import _refuse_leaks
    from posepress.errors import UserError

    record = images.open("validation").records[0]
    job = Job(tmp_path, {}, {}, tmp_path, tmp_path)
    listed = [{"id": str(record["id"]), "file_name": "other.jpg", "split": "train", "sha256": "0"}]
    with pytest.raises(UserError, match=rf"other.jpg has the id {record['id']} of a validation image"):
        _refuse_leaks(job, images, listed)
    _refuse_leaks(job, images, [{**listed[0], "split": "image_dir"}])


def test_what_is_put_into_the_folder_makes_its_sample_stale(smoke, tmp_path):
    folder = noise(tmp_path, 3)
    words = [*WORDS, f"sampler.image_dir={folder}", "sampler.num_images=2", "stage=sample"]
    pipeline(*words, cwd=smoke, check=0)
    assert "fresh" in pipeline(*words, cwd=smoke, check=0).stderr
    cv2.imwrite(str(folder / "own9.png"), np.full((90, 100, 3), 7, np.uint8))
    assert "done" in pipeline(*words, cwd=smoke, check=0).stderr
    manifest = (smoke / "outputs/smoke/sample/stratified-2-dir-s0/manifest.json").read_text()
    assert str(tmp_path) not in manifest


def test_calibration_images_come_from_train_or_unlabelled_only(smoke):
    done = pipeline(*WORDS, "sampler.images=[validation]", "stage=sample", cwd=smoke)
    assert "sampler.images=[validation]: choose a list" in refused(done)
    pipeline(*WORDS, "sampler.images=[train,unlabelled]", "sampler.num_images=9", "stage=sample", cwd=smoke, check=0)
    assert (smoke / "outputs/smoke/sample/stratified-9-train+unlabelled-s0/calibration.json").exists()


def test_a_study_of_calibration_is_plotted_without_a_benchmark(smoke):
    (weights,) = (smoke / "outputs/smoke/train").glob("*/model.safetensors")
    words = ["experiment=calibration_study", f"weights={weights}", "data=synthetic_smoke", "model.width=0.125", "tracking=none"]
    words += ["training_resolution=64x80", "sampler=uniform,coverage", "sampler.num_images=4", "sampler.seed=0,1"]
    pipeline("--multirun", *words, "precision.calibration_method=minmax", cwd=smoke, check=0)
    page = (smoke / "outputs/calibration_study/report/report.html").read_text()
    assert "Calibration study" in page
    assert "<td>coverage</td><td>minmax</td><td>4</td><td>2</td>" in page
