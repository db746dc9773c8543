"""stage=predict on a finished result: the files, and the same result as `posepress.load`."""

import json

import pytest

import posepress
from tests.conftest import SMOKE, pipeline, refused
from tests.posepress.planted import picture


def test_an_engine_predicts_as_it_was_evaluated(smoke):
    images = next(smoke.glob("outputs/cache/synthetic/*/images/validation"))
    words = ["stage=predict", f"source={images}", "stages.predict.save=[coco]"]
    done = pipeline(*SMOKE, *words, cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/predict").iterdir()
    rows = json.loads((folder / "validation.json").read_text())
    evaluated = json.loads((smoke / "outputs/smoke/evaluate" / folder.name / "predictions.json").read_text())
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in evaluated])
    assert "images," in done.stderr + done.stdout
    with posepress.load(f"smoke/{folder.name}", outputs=smoke / "outputs") as model:
        found = [row for file in sorted(images.iterdir()) for row in model(file).to_coco(0)]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in rows])


def test_it_runs_again_and_needs_a_source(smoke):
    assert "source=null: nothing to predict" in refused(pipeline(*SMOKE, "stage=predict", cwd=smoke))
    picture(smoke / "in/1.png", 96, 128)
    for _ in range(2):
        pipeline(*SMOKE, "stage=predict", f"source=[{smoke}/in]", cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/predict").iterdir()
    assert {"1.jpg", "in.json"} <= {file.name for file in folder.iterdir()}
    assert "no such image" in refused(pipeline(*SMOKE, "stage=predict", f"source={smoke}/none", cwd=smoke))
