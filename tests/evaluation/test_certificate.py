"""What `make test-gpu` runs works on the double, and fails where it should."""

import json
import sys

import pytest

from posepress.runners.tensorrt_module import load
from tests.conftest import ROOT, SMOKE, pipeline


@pytest.fixture
def certificate(smoke, monkeypatch, doubles):
    """Of a sweep with an FP32 engine."""
    monkeypatch.setenv("POSEPRESS_TENSORRT_DOUBLE", "10_16")
    pipeline(*SMOKE, "backend=tensorrt", "stage=[build,evaluate,benchmark]", cwd=smoke, double=True, check=0)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    monkeypatch.chdir(smoke)
    load.cache_clear()
    import certify

    yield certify.Certificate(smoke / "outputs/smoke", "smoke")
    load.cache_clear()
    sys.modules.pop("certify")


def test_stripped_cached_and_dynamic_engines_pass(certificate):
    for name in ("stripped", "cached", "dynamic"):
        certificate.check(name, getattr(certificate, name))
    assert [row["passed"] for row in certificate.rows] == [True] * 3
    certificate.check("AP", lambda: certificate.accuracy("fp32"))
    assert certificate.rows[-1]["passed"] is True
    assert certificate.precisions() == ["fp32", "fp16", "int8", "bf16", "fp8", "int8_entropy"]


def test_an_engine_that_finds_other_people_or_is_slow_fails(certificate, tmp_path, monkeypatch):
    manifest = certificate.folder("evaluate", "fp32", "tensorrt") / "manifest.json"
    content = json.loads(manifest.read_text())
    content["summary"]["ap"] += 0.01
    manifest.write_text(json.dumps(content))
    assert certificate.accuracy("fp32")[0] is False
    timed = certificate.folder("benchmark", "fp32", "tensorrt") / "manifest.json"
    content = json.loads(timed.read_text())
    content["summary"]["latency_p50_ms"] = 1.2
    timed.write_text(json.dumps(content))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert certificate.latency("fp32") == (None, "no trtexec on PATH")
    for median, passed in ((1.1, True), (1.0, False)):
        (tmp_path / "trtexec").write_text(f"#!/bin/sh\necho 'GPU Compute Time: min = 1 ms, median = {median} ms'\n")
        (tmp_path / "trtexec").chmod(0o755)
        assert certificate.latency("fp32")[0] is passed
