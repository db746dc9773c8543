"""A small results.zip as a device writes it, made without a device: the ground of tests of what others may put into one."""

import io
import json
import zipfile
from hashlib import sha256

import numpy as np

from pipeline.results.content import digest_of
from pipeline.results.manifest import MANIFEST
from pipeline.results.stage import Stage
from pipeline.results.store import Results

DEVICE = "a.cpu"
NETWORK = "net_dense_64x80_pad_int8"
ADDRESS = f"{NETWORK}_onnxruntime-{DEVICE}-b1"
BUILD, EVALUATE, BENCHMARK = f"build/{ADDRESS}", f"evaluate/{ADDRESS}", f"benchmark/{ADDRESS}_t1"
AXES = {
    "data": "images", "network": "net", "pruning": "dense", "resolution": "64x80", "keep_aspect_ratio_mode": "pad",
    "precision": "int8", "calibration": "auto", "backend": f"onnxruntime-{DEVICE}", "batch": 1, "rebuild": 0, "seed": 0,
}  # fmt: skip
FIGURES = {
    "ap": 0.5, "ap_lo": 0.4, "ap_hi": 0.6, "ap50": 0.7, "ap75": 0.4, "ap_medium": -1.0, "ap_large": 0.5, "as_found_ap": 0.4,
    "images": 12, "primary": "ap", "backend": "onnxruntime", "data_digest": "ab" * 32, "dropped_peaks": 0,
    "category": "person",
}  # fmt: skip
TIMES = {
    "timed": 1, "latency_p50_ms": 1.5, "latency_p50_ms_lo": 1.4, "latency_p50_ms_hi": 1.6, "decoding_p50_ms": 0.1, "threads": 1,
    "batch": 1, "backend": "onnxruntime", "device": "A CPU (2 cores)", "ran": "int8 100%", "not_in_int8": [], "speedup": 2.0,
    "speedup_lo": 1.9, "speedup_hi": 2.1,
}  # fmt: skip
LAYERS = [{"name": "conv", "op": "Conv", "precision": "int8", "macs": 100, "us": 5.0, "quantized": True, "reason": ""}]
JPEG = b"\xff\xd8\xff\xe0" + b"0" * 50


def draws(values=(0.4, 0.5, 0.6), images=("1", "2")):
    """The bytes of a file of draws."""
    file = io.BytesIO()
    np.savez_compressed(file, images=np.array(images, dtype=str), value=0.5, values=np.array(values))
    return file.getvalue()


def local(folder):
    """Results of this machine that the package was made of: one quantized network."""
    results = Results(folder / "outputs", "x", "run")
    stage = Stage("quantize", NETWORK, {"_target_": "x.y"})
    fingerprint, parts = results.fingerprint(stage, {}, None, {})
    with results.writing(stage) as out:
        (out / "onnxruntime.onnx").write_bytes(b"a network")
        results.finish(out, fingerprint, parts, {"macs": 100})
    return results


def manifest(place, files, inputs, config, summary):
    """A manifest of some files, as text."""
    stage, address = place.split("/")
    listed = {name: sha256(blob).hexdigest() for name, blob in files.items()}
    made = {"stage": stage, "address": address, "config": config, "inputs": inputs, "code": "c", "toolchain": {}}
    return {**made, "fingerprint": "f", "files": listed, "digest": digest_of(listed), "summary": summary}


def contents(results):
    """By place: the files of a result, its inputs, config and summary; a function may change them before they are packed."""
    network = results.folder(Stage("quantize", NETWORK, {})) / MANIFEST
    quantized = [{"stage": "quantize", "address": NETWORK, "digest": json.loads(network.read_text())["digest"]}]
    pictures = {
        "pictures/000001.jpg": JPEG,
        "pictures/captions.json": json.dumps({"000001.jpg": "https://example.org/1"}).encode(),
    }
    evaluation = {
        "metrics.json": json.dumps({**FIGURES, "axes": AXES}).encode(),
        "details.json": json.dumps({"keypoints": {"nose": 0.5, "eye": -1.0}}).encode(),
        "draws.npz": draws(),
        "predictions.json": b"[]",
        **pictures,
    }
    timing = {"latency.json": json.dumps(TIMES).encode(), "audit.json": json.dumps(LAYERS).encode()}
    engine = {"engine.onnx": b"an engine" * 100}
    return {
        BUILD: [engine, {"network": quantized}, {}, {"engine": "engine.onnx", "engine_mb": 0.1, "backend": "onnxruntime"}],
        EVALUATE: [evaluation, {"engine": None}, {"axes": AXES}, dict(FIGURES)],
        BENCHMARK: [timing, {"engine": None}, {"axes": AXES}, dict(TIMES)],
    }


def packed(results, file, change=lambda _: None, listing=lambda _: None, raw=lambda _: None, **options):
    """Write results.zip.

    Args:
        results: of this machine.
        file: to write.
        change: changes the contents before they are sealed, as an attacker would.
        listing: changes package.json.
        raw: changes the members, by name, at the end, so that nothing fits them any more.
        options: of ZipFile.
    """
    found = contents(results)
    change(found)
    members, made = {}, {}
    for place, (files, inputs, config, summary) in found.items():
        engines = [{"stage": "build", "address": BUILD.split("/")[1], "digest": made.get(BUILD, "")}]
        whole = {role: engines if entries is None else entries for role, entries in inputs.items()}
        content = manifest(place, files, whole, config, summary)
        made[place] = content["digest"]
        members |= {f"{place}/{name}": blob for name, blob in files.items()}
        members[f"{place}/{MANIFEST}"] = json.dumps(content).encode()
    network = results.folder(Stage("quantize", NETWORK, {})) / MANIFEST
    about = {"name": "x", "device": DEVICE, "backend": "onnxruntime", "options": ["precision=int8"]}
    about["made_of"] = {f"quantize/{NETWORK}": json.loads(network.read_text())["digest"]}
    about["files"] = {name: sha256(blob).hexdigest() for name, blob in members.items()}
    listing(about)
    members["package.json"] = json.dumps(about).encode()
    raw(members)
    with zipfile.ZipFile(file, "w", **{"compression": zipfile.ZIP_DEFLATED, **options}) as archive:
        for name, blob in members.items():
            archive.writestr(name, blob)
    return file
