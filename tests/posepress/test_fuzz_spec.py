"""Descriptions of networks as strangers might write them: a plain error or a description, never anything else."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.onnx_files.files import described, named
from posepress.errors import UserError
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.sampled_from([10**400, -(10**400), 1e308, 1e-308, 0.5, 255.0]),
)
LEAVES = st.one_of(
    st.none(), NUMBERS, st.text(max_size=8), st.sampled_from(["RGB", "bgr", "NCHW", "float32", "batch", "coco_17"])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12
)
INPUTS = ("name", "order", "range", "mean", "std", "pad", "multiple", "offset", "layout", "dtype")
GOOD = {
    "input": {"name": "image", "order": "BGR", "range": 255.0, "mean": [0, 0, 0], "std": [1, 1, 1], "multiple": 8},
    "fields": [{"name": "heatmaps", "stride": 8, "channels": 3}, {"name": "pafs", "stride": 8, "channels": 4}],
    "labels": {"names": ["a", "b", "c"], "limbs": [[0, 1], [1, 2]], "sigmas": [0.1, 0.1, 0.1]},
    "dynamic": ["batch"],
}
PATHS = [
    (key, *rest)
    for key, inner in (
        ("input", [(name,) for name in (*INPUTS, "unknown")]),
        ("fields", [(0,), (1,), *((n, name) for n in (0, 1) for name in ("name", "stride", "channels", "shift", "x"))]),
        (
            "labels",
            [("names",), ("limbs",), ("sigmas",), ("colours",), ("limbs", 0), ("names", 1), ("limbs", 1, 0), ("sigmas", 2)],
        ),
        ("dynamic", [(0,)]),
        ("more", []),
    )
    for rest in [(), *inner]
]


def planted(changes):
    """GOOD with values put at paths, where the path is still there."""
    raw = json.loads(json.dumps(GOOD))
    for path, value in changes:
        at = raw
        for key in path[:-1]:
            if not isinstance(at, (dict, list)) or (isinstance(at, list) and (not isinstance(key, int) or key >= len(at))):
                at = None
                break
            at = at.get(key) if isinstance(at, dict) else at[key]
        if isinstance(at, dict) or (isinstance(at, list) and isinstance(path[-1], int) and path[-1] < len(at)):
            at[path[-1]] = value
    return raw


def sound(spec):
    """What compiled code counts on."""
    order, factor, offset = spec.input.form()
    assert order.shape == factor.shape == offset.shape == (3,)
    assert min(spec.input.std) > 0
    assert 0 <= spec.input.pad <= 255
    assert spec.input.multiple >= 1
    assert all(field.stride >= 1 and field.channels >= 1 for field in spec.fields)
    if hasattr(spec.labels, "limbs"):
        K = len(spec.labels.names)
        assert all(0 <= end < K for limb in spec.labels.limbs for end in limb)
        assert len(spec.labels.flip) == K
    assert NetworkSpec.from_json(spec.to_json()) == spec
    named(spec)


@given(st.lists(st.tuples(st.sampled_from(PATHS), LEAVES | TREES), min_size=1, max_size=3))
def test_a_description_with_wrong_values_is_refused_or_sound(changes):
    try:
        spec = described(planted(changes))
    except UserError as error:
        assert str(error).startswith("model.spec")
        assert len(str(error)) < 2000
        return
    sound(spec)


@given(TREES)
def test_what_is_no_description_is_refused(raw):
    try:
        sound(described(raw))
    except UserError as error:
        assert str(error).startswith("model.spec")


TEXT = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 17),), COCO_17).to_json()


@given(st.integers(0, len(TEXT) - 1), st.text(max_size=6), st.integers(0, 6))
def test_damaged_json_is_refused_or_sound(place, inserted, removed):
    try:
        spec = NetworkSpec.from_json(TEXT[:place] + inserted + TEXT[place + removed :])
    except ValueError:
        return
    sound(spec)


@given(
    st.one_of(st.text(), st.integers(0, 100_000).map(lambda n: "[" * n), st.integers(0, 100_000).map(lambda n: '{"input":' * n))
)
def test_other_text_is_refused(text):
    try:
        NetworkSpec.from_json(text)
    except ValueError:
        return
    raise AssertionError(text)
