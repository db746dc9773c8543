"""Given ONNX files against their descriptions: what is adopted, and what is refused in one line that names the fix."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.launch.cell import Cell
from pipeline.onnx_files.adopt import adopt
from pipeline.onnx_files.cut import external_files
from pipeline.onnx_files.files import described, named, read_spec
from pipeline.onnx_files.given import check_request, quantized, simulated, unlike_metadata
from pipeline.quantization.place import place
from pipeline.results.stage import Stage
from pipeline.results.store import Results
from posepress.decoders.heatmap_argmax import TopDownDecoder
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder
from posepress.errors import UserError
from posepress.framing.person_crops import PersonCrops
from posepress.framing.whole_image import WholeImage
from posepress.labels import Skeleton
from posepress.pixels import normalise
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.skeletons import OPENPOSE_18
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec
from tests.conftest import REAL, replaced

SIZE = Resolution(32, 48)
RAW = {
    "input": {"name": "image", "multiple": 8},
    "fields": [{"name": "heatmaps", "stride": 4, "channels": 3}, {"name": "pafs", "stride": 4, "channels": 4}],
    "labels": {"names": ["a", "b", "c"], "limbs": [[0, 1], [1, 2]], "sigmas": [0.1, 0.1, 0.1]},
    "dynamic": None,
}


def changed(path, value):
    """RAW with one value changed."""
    return replaced(RAW, path, value)


def network(shape=("n", 3, "h", "w"), outputs=("heatmaps", "pafs"), name="image", body=(), consts=(), opset=17):
    """A patch embedding with two heads; `body` nodes stand between them, from "x" to "y" if there are some."""
    draw = np.random.default_rng(0)
    weights = {
        "w": draw.normal(0, 0.1, (5, 3, 4, 4)),
        "wh": draw.normal(0, 0.5, (3, 5, 1, 1)),
        "wp": draw.normal(0, 0.5, (4, 5, 1, 1)),
    }
    last = "y" if body else "x"
    nodes = [
        helper.make_node("Conv", [name, "w"], ["x"], strides=[4, 4], name="stem"),
        *body,
        helper.make_node("Conv", [last, "wh"], [outputs[0]], name="heat"),
        helper.make_node("Conv", [last, "wp"], [outputs[1]], name="limbs"),
    ]
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    constants += [numpy_helper.from_array(v, k) for k, v in dict(consts).items()]
    value = helper.make_tensor_value_info
    outs = [value(o, TensorProto.FLOAT, [shape[0], c, None, None]) for o, c in zip(outputs, (3, 4), strict=True)]
    graph = helper.make_graph(nodes, "g", [value(name, TensorProto.FLOAT, shape)], outs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def reshaped(*shapes):
    """Reshape nodes from "x" to "y", r0 to the first shape and so on."""
    names = ["x", *(f"t{n}" for n in range(len(shapes) - 1)), "y"]
    nodes = [helper.make_node("Reshape", [names[n], f"s{n}"], [names[n + 1]], name=f"r{n}") for n in range(len(shapes))]
    return {"body": nodes, "consts": {f"s{n}": np.array(shape, np.int64) for n, shape in enumerate(shapes)}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "given.onnx"


def adopted(file, model=None, raw=RAW, outputs=None, size=SIZE):
    onnx.save(model or network(), file)
    return adopt(file, raw, outputs, size)


def run(model, images, names=None):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(names, {session.get_inputs()[0].name: images})


IMAGES = np.random.default_rng(1).normal(0, 1, (1, 3, 32, 48)).astype(np.float32)


def same_function(made, given, names):
    ours, theirs = run(made.model, IMAGES), run(given, IMAGES, names)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_a_file_as_described_is_adopted_without_a_word(file):
    made = adopted(file)
    assert made.notes == []
    assert made.spec.dynamic == {"batch", "height", "width"}
    assert [o.name for o in made.model.graph.output] == ["heatmaps", "pafs"]
    same_function(made, network(), ["heatmaps", "pafs"])


@pytest.mark.parametrize(
    ("model", "raw", "outputs", "note"),
    [
        (network(name="data"), RAW, None, "its input is called 'data', not 'image'"),
        (network(outputs=("397", "400")), RAW, None, "its output '397' is taken as heatmaps"),
        (network(outputs=("397", "400")), RAW, {"heatmaps": 397, "pafs": "400"}, None),
        (network(outputs=("pafs", "heatmaps")), RAW, {"heatmaps": "pafs", "pafs": "heatmaps"}, None),
        (network(outputs=("397", "400")), changed(("fields", 0, "name"), "397"), {"pafs": "400"}, "'397' is taken as heatmaps"),
        (network(outputs=("x0", "image0"), name="in"), RAW, {"pafs": "image0"}, "its output 'x0' is taken as heatmaps"),
    ],
)
def test_names_are_read_off_the_file_or_given(file, model, raw, outputs, note):
    made = adopted(file, model, raw, outputs)
    assert [o.name for o in made.model.graph.output] == ["heatmaps", "pafs"]
    assert (note or "") in "; ".join(made.notes)
    assert bool(note) == bool(made.notes)
    same_function(made, model, [o.name for o in model.graph.output])
    assert made.spec.input.name == made.model.graph.input[0].name


def test_tensors_inside_make_way_for_the_fields(file):
    model = network(
        outputs=("h", "p"), body=[helper.make_node("Relu", ["x"], ["pafs"]), helper.make_node("Relu", ["pafs"], ["y"])]
    )
    made = adopted(file, model)
    assert [output.name for output in made.model.graph.output] == ["heatmaps", "pafs"]
    inside = {name for node in made.model.graph.node if node.op_type == "Relu" for name in node.output}
    assert not inside & {"heatmaps", "pafs"}
    same_function(made, model, ["h", "p"])


def test_fields_described_by_their_own_names_are_heatmaps_and_pafs(file):
    raw = changed(("fields", 0, "name"), "400")
    raw["fields"][1]["name"] = "397"
    model = network(outputs=("400", "397"))
    assert adopted(file, model, raw).sources == {"heatmaps": "400", "pafs": "397"}
    raw["fields"].reverse()
    made = adopted(file, model, raw)
    assert made.sources == {"pafs": "397", "heatmaps": "400"}
    assert {f.name: f.channels for f in made.spec.fields} == {"heatmaps": 3, "pafs": 4}


def test_our_own_files_tell_how_pixels_become_their_input(file):
    model = network()
    onnx.save(model, file)
    spec = described(RAW)
    assert unlike_metadata(file, spec) == [], "a file of others tells nothing"
    own = replace(spec, input=replace(spec.input, order="BGR", range=255.0))
    onnx.helper.set_model_props(model, {SPEC_KEY: own.to_json()})
    onnx.save(model, file)
    order, scale = unlike_metadata(file, spec)
    assert order == f"model.spec.input.order=RGB: the metadata of {file} says otherwise; give 'model.spec.input.order=BGR'"
    assert scale.endswith("give 'model.spec.input.range=255.0'")
    own = replace(spec, input=replace(spec.input, mean=(0.1, 0.2, 0.3)))
    onnx.helper.set_model_props(model, {SPEC_KEY: own.to_json()})
    onnx.save(model, file)
    assert unlike_metadata(file, spec)[0].endswith("give 'model.spec.input.mean=[0.1,0.2,0.3]'")
    assert unlike_metadata(file, own) == []
    whole = replace(own, input=replace(own.input, range=1))
    assert unlike_metadata(file, whole) == [], "1 is 1.0"


def test_an_ambiguous_file_asks_which_output_is_which(file):
    model = network(outputs=("397", "400"))
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, None, None]))
    assert adopted(file, model).sources == {"heatmaps": "397", "pafs": "400"}
    model.graph.node.append(helper.make_node("Relu", ["397"], ["401"]))
    model.graph.output.append(helper.make_tensor_value_info("401", TensorProto.FLOAT, ["n", 3, None, None]))
    with pytest.raises(UserError, match=r"'397' \[n, 3, 8, 12\].*assign them, for example 'model.outputs=\{heatmaps: 397"):
        adopted(file, model)
    assert adopted(file, model, outputs={"heatmaps": "401"}).sources == {"heatmaps": "401", "pafs": "400"}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"heatmap": "heatmaps"}, r"model.outputs.heatmap: no such field; did you mean 'heatmaps'"),
        ({"pafs": "paf"}, r"model.outputs.pafs=paf: .* has no such output; it has 'heatmaps' \[n, 3, 8, 12\]"),
        ({"heatmaps": "pafs", "pafs": "pafs"}, "one output is given to two fields"),
        ("397", r"model.outputs=397: give it as \{heatmaps: NAME\}"),
    ],
)
def test_wrong_outputs_are_refused(file, outputs, message):
    with pytest.raises(UserError, match=message):
        adopted(file, outputs=outputs)


def test_free_axes_are_read_off_the_file(file):
    for shape, free in (
        ((1, 3, 32, 48), set()),
        (("n", 3, 32, 48), {"batch"}),
        ((1, 3, "h", "w"), {"height", "width"}),
        ((1, 3, 32, "w"), {"width"}),
        ((None, 3, None, None), {"batch", "height", "width"}),
        ((-1, 3, "s", "s"), {"batch", "height", "width"}),
    ):
        assert adopted(file, network(shape)).spec.dynamic == free
    made = adopted(file, raw={**RAW, "dynamic": []})
    assert [d.dim_value for d in made.model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 48]
    assert adopted(file, network((1, 3, 40, 40))).size == Resolution(40, 40), "its own size, not the resolution"


def head(model, *nodes, outputs, **consts):
    """A network whose heatmaps go through further nodes; `outputs` are (name, type, shape)."""
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in consts.items())
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(*o) for o in outputs)
    return model


FLOAT, ONE = TensorProto.FLOAT, changed(("fields",), RAW["fields"][:1])
ANCHORS = head(
    network(),
    helper.make_node("Reshape", ["heatmaps", "s"], ["output0"]),
    outputs=[("output0", FLOAT, ["n", 3, "anchors"])],
    s=np.array([0, 3, -1], np.int64),
)
LAST = head(
    network(),
    helper.make_node("Transpose", ["heatmaps"], ["last"], perm=[0, 2, 3, 1]),
    outputs=[("last", FLOAT, ["n", None, None, 3])],
)
MASK = head(
    network(),
    helper.make_node("ArgMax", ["heatmaps"], ["mask"], axis=1, keepdims=1),
    outputs=[("mask", TensorProto.INT64, ["n", 1, None, None])],
)


@pytest.mark.parametrize(
    ("model", "raw", "message"),
    [
        (ANCHORS, ONE, r"'output0' is \[n, 3, anchors\], no \[n, C, h, w\]"),
        (
            ANCHORS,
            RAW,
            r"its one output 'output0' \[n, 3, 96\] does not hold the fields .*3 heatmaps \+ 4 pafs have 7 channels",
        ),
        (LAST, ONE, r"'last' is \[1, 8, 12, 3\] for an image of 32x48: 8 channels, and model.spec says 3; .* channels last"),
        (MASK, changed(("fields",), [{**RAW["fields"][0], "channels": 1}]), r"'mask' is int64; expected is float32"),
        (
            network(),
            changed(("fields", 0, "channels"), 4),
            r"'heatmaps' is \[1, 3, 8, 12\] .* 3 channels, and model.spec says 4",
        ),
        (
            network(),
            changed(("fields", 1, "stride"), 8),
            r"32x48 at stride 8 are maps of 4x6, the file gives 8x12; set its stride: 4",
        ),
        (network(), changed(("fields", 1, "stride"), 3), r"32x48 at stride 3 are maps of 10.6667x16, the file gives 8x12"),
        (
            network(outputs=("h", "p")),
            changed(("fields", 1, "channels"), 9),
            r"no output is pafs, \[n, 9, h, w\]; its",
        ),
        (network((4, 3, 32, 48)), RAW, "its batch is fixed at 4; export it with a free batch"),
        (network((1, 3, 36, 48)), RAW, "takes 36x48, which are no multiples of 8 plus 0; set model.spec.input.multiple"),
        (network((1, 3, 32, 48)), {**RAW, "dynamic": ["batch"]}, r"dynamic holds 'batch', but its input is \[1, 3, 32, 48\]"),
        (network(("n", 1, "h", "w")), RAW, r"its input 'image' is \[n, 1, h, w\]; expected are images \[n, 3, h, w\]"),
        (network(**reshaped([1, 5, 8, 12])), RAW, r"its node 'r0' is for batch 1; set 'model.spec.dynamic=\[height,width\]'"),
        (
            network(("n", 3, 32, 48), **reshaped([1, 5, -1], [1, 5, 8, 12])),
            RAW,
            r"'r0' is for batch 1; set 'model.spec.dynamic=\[\]'",
        ),
        (
            network((1, 3, "h", "w"), **reshaped([1, 5, 8, 12])),
            RAW,
            r"does not run at 40x64: its node 'r0' \(Reshape\): The input tensor cannot be reshaped .*resolution=32x48",
        ),
        (
            network((1, 3, "h", "w"), **reshaped([1, 5, 8, -1])),
            RAW,
            r"40x64 at stride 4 are maps of 10x16, the file gives 8x20",
        ),
    ],
)
def test_what_is_not_as_described_is_refused(file, model, raw, message):
    with pytest.raises(UserError, match=message) as caught:
        adopted(file, model, raw)
    assert "\n" not in str(caught.value)


def test_two_images_that_mix_are_found(file):
    mixing = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])]
    with pytest.raises(UserError, match="takes one image: two images at once give other values than one"):
        adopted(file, network(body=mixing))


@pytest.mark.parametrize(
    ("kind", "name"), [(TensorProto.UINT8, "uint8"), (TensorProto.INT32, "int32"), (TensorProto.FLOAT16, "float16")]
)
def test_inputs_of_other_types_are_refused(file, kind, name):
    model = network()
    model.graph.input[0].name = "raw"
    model.graph.input[0].type.tensor_type.elem_type = kind
    model.graph.node.insert(0, helper.make_node("Cast", ["raw"], ["image"], to=FLOAT))
    fix = "export it with float32 images" if name == "int32" else f".*set model.spec.input.dtype={name}"
    with pytest.raises(UserError, match=f"its input 'raw' is {name}(;|, and model.spec says float32;) {fix}"):
        adopted(file, model)


@pytest.mark.parametrize("shape", [(1, 32, 48, 3), ("n", "h", "w", 3), (None, None, None, None)])
def test_images_with_their_channels_last_are_refused(file, shape):
    model = network()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("raw", FLOAT, shape))
    model.graph.node.insert(0, helper.make_node("Transpose", ["raw"], ["image"], perm=[0, 3, 1, 2]))
    with pytest.raises(UserError, match=r"its input 'raw' .*channels last.*; set model.spec.input.layout=NHWC"):
        adopted(file, model)


def test_operators_of_others_are_named(file):
    model = network()
    model.graph.node[-1].domain, model.graph.node[-1].op_type = "mmdeploy", "MyConv"
    model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    with pytest.raises(UserError, match="mmdeploy:MyConv is not known to ONNX Runtime; export the network with") as caught:
        adopted(file, model)
    assert "\n" not in str(caught.value)


def test_several_inputs_are_refused(file):
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("scale", FLOAT, [1]))
    with pytest.raises(UserError, match="its inputs are image, scale; give a network whose one input is images"):
        adopted(file, model)


def test_constants_may_be_inputs(file):
    model = network(opset=9)
    model.ir_version = 3
    model.graph.input.extend(helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in model.graph.initializer)
    made = adopted(file, model)
    assert [i.name for i in made.model.graph.input] == ["image"]
    same_function(made, model, ["heatmaps", "pafs"])


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13])
def test_old_opsets_are_raised_to_one_that_holds_int8(file, opset):
    made = adopted(file, network(opset=opset))
    assert made.model.opset_import[0].version >= 13
    assert made.notes == ([f"raised from opset {opset} to 20"] if opset < 13 else [])
    same_function(made, network(opset=opset), ["heatmaps", "pafs"])


def test_an_old_opset_that_cannot_be_raised_stays_and_says_so(file, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no adapter for Upsample")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    made = adopted(file, network(opset=11))
    assert made.model.opset_import[0].version == 11
    assert made.notes == [
        "stays at opset 11 (no adapter for Upsample): INT8 needs opset 13 or newer; for INT8, export it with that"
    ]


def damages():
    whole = network().SerializeToString()
    return (b"", b"nothing", b"\x08\x08", whole[: len(whole) // 2], b"\x80\x02cposix\nsystem\nq\x00.")


@pytest.mark.parametrize("content", damages())
def test_what_is_no_onnx_file_is_refused_in_a_line(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match="model.onnx=.*given.onnx: not a valid ONNX file") as caught:
        adopt(file, RAW, None, SIZE)
    assert "\n" not in str(caught.value)


def broken(change):
    model = network()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.graph.node[0], "op_type", "Convv"), "No Op registered for Convv"),
        (lambda m: m.graph.node[-1].input.__setitem__(0, "nope"), "input 'nope'"),
        (
            lambda m: setattr(m.opset_import[0], "version", 99),
            "of opset 99, which is too new here; export it with opset_version",
        ),
        (lambda m: setattr(m, "ir_version", 99), "ir_version 99"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 50), "not a valid ONNX file|does not run"),
    ],
)
def test_broken_files_are_refused_in_a_line(file, change, message):
    with pytest.raises(UserError, match=message) as caught:
        adopted(file, broken(change))
    assert "\n" not in str(caught.value)


def external(file, **options):
    onnx.save(network(), file, save_as_external_data=True, location="weights.bin", size_threshold=0, **options)


def test_weights_beside_the_file_are_taken_in(file):
    external(file)
    made = adopt(file, RAW, None, SIZE)
    assert not any(i.external_data for i in made.model.graph.initializer)
    same_function(made, network(), ["heatmaps", "pafs"])
    (file.parent / "weights.bin").unlink()
    with pytest.raises(UserError, match="weights.bin"):
        adopt(file, RAW, None, SIZE)


def test_the_fingerprint_follows_weights_beside_the_file(file):
    stage = Stage("export", "a", {"onnx": str(file)}, files=("onnx",))
    results = Results(file.parent / "outputs", "n", "r")
    onnx.save(network(), file)
    whole = results.fingerprint(stage, {}, None, {})[1]["config"]["onnx"]
    assert list(whole) == ["sha256"], "a file without further ones keeps the fingerprint it had"
    external(file)
    assert external_files(file) == {"weights.bin": file.parent / "weights.bin"}
    before = results.fingerprint(stage, {}, None, {})[0]
    assert results.fingerprint(stage, {}, None, {})[0] == before
    weights = bytearray((file.parent / "weights.bin").read_bytes())
    weights[7] ^= 1
    (file.parent / "weights.bin").write_bytes(weights)
    assert results.fingerprint(stage, {}, None, {})[0] != before
    (file.parent / "weights.bin").unlink()
    assert results.fingerprint(stage, {}, None, {})[0] != before


def test_a_name_of_weights_that_leaves_the_folder_is_not_followed(file):
    external(file)
    model = onnx.load(file, load_external_data=False)
    for entry in (e for i in model.graph.initializer for e in i.external_data if e.key == "location"):
        entry.value = "../secret"
    file.write_bytes(model.SerializeToString())
    (file.parent.parent / "secret").write_bytes(b"x" * 10_000)
    assert external_files(file) == {}
    with pytest.raises(UserError, match="not a valid ONNX file"):
        adopt(file, RAW, None, SIZE)


# ---------- what is asked of the engine ----------


def asked(file, raw=RAW, precision="fp32", resolution=SIZE, batch=1, one_size=True):
    check_request(file, described(raw), precision, {"resolution": resolution}, {"batch": batch}, one_size)


def test_a_file_of_one_shape_is_asked_for_that_alone(file):
    onnx.save(network((1, 3, 32, 48)), file)
    asked(file)
    with pytest.raises(UserError, match="batch=4: .* takes only a batch of 1; set batch=1"):
        asked(file, batch=4)
    with pytest.raises(UserError, match="resolution=64x48: .* takes only 32x48; set training_resolution=32x48"):
        asked(file, resolution=Resolution(64, 48))
    with pytest.raises(UserError, match="ask for inputs of several sizes, .* takes one"):
        asked(file, one_size=False)
    onnx.save(network(), file)
    asked(file, batch=4, resolution=Resolution(64, 48), one_size=False)
    with pytest.raises(UserError, match="takes only a batch of 1;"):
        asked(file, {**RAW, "dynamic": ["height", "width"]}, batch=4)


def test_the_input_itself_may_be_a_field(file):
    model = network((1, 3, 32, 48))
    model.graph.node[1].input[1] = "wi"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((3, 5, 1, 1), np.float32), "wi"))
    model.graph.output[0].name = "image"
    raw = changed(("fields", 0, "stride"), 1)
    made = adopted(file, model, raw, {"heatmaps": "image"})
    assert np.array_equal(run(made.model, IMAGES)[0], IMAGES)


def test_outputs_that_are_no_tensors_are_left_out(file):
    model = network()
    model.graph.node.append(helper.make_node("SequenceConstruct", ["x"], ["several"]))
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    model.graph.output.append(helper.make_value_info("several", kind))
    assert list(adopted(file, model).sources) == ["heatmaps", "pafs"]


def test_weights_of_16_bits_are_said(file):
    model = network()
    (weight,) = [i for i in model.graph.initializer if i.name == "w"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "w"))
    onnx.save(model, file)
    (said,) = check_request(file, described(RAW), "fp32", {}, {}, True)
    assert "has weights of 16 bits ('w'), so that precision=fp32 means these 16-bit weights" in said


def test_int8_needs_scales_for_each_channel():
    with pytest.raises(
        UserError, match="the network is of opset 11, and INT8 begins at opset 13; export it with opset_version=13"
    ):
        place(network(opset=11))


INTEGERS = ["QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear", "MatMulNBits"]
INTEGERS += ["MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "QConcat", "MatMulBnb4", "GatherBlockQuantized"]


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_quantized_file_stands_for_no_float_network(file, kind):
    model = network()
    model.graph.node.append(helper.make_node(kind, ["x"], ["z"], name="q"))
    file.write_bytes(model.SerializeToString())
    assert quantized(model) == ["q"]
    for precision in ("fp32", "fp16", "int8", "mixed"):
        with pytest.raises(
            UserError, match=r"already quantized \(1 nodes, the first is 'q'\).*precision=external precision.file"
        ):
            asked(file, precision=precision)
    asked(file, precision="external")


ROUNDED = {
    "round, then clip": [("Div", "x s", "a"), ("Round", "a", "b"), ("Clip", "b low high", "c"), ("Mul", "c s", "z")],
    "clip, then round": [("Div", "x s", "a"), ("Clip", "a low high", "b"), ("Round", "b", "c"), ("Mul", "c s", "z")],
    "a zero point between": [("Div", "x s", "a"), ("Round", "a", "b"), ("Add", "b s", "c"), ("Clip", "c low high", "z")],
    "limits that are tensors": [("Div", "x s", "a"), ("Round", "a", "b"), ("Max", "b low", "c"), ("Min", "c high", "z")],
    "straight-through": [
        *(("Div", "x s", "a"), ("Round", "a", "b"), ("Sub", "b a", "c"), ("Add", "a c", "d"), ("Add", "d s", "e")),
        ("Clip", "e low high", "z"),
    ],
    "int8 weights": [("Cast", "narrow", "a"), ("Mul", "a s", "z")],
}


def with_nodes(nodes):
    """The network with further nodes, as kind, inputs and output."""
    model = network()
    for name, value in (("s", 0.1), ("low", -128), ("high", 127)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.int8), "narrow"))
    for kind, given, made in nodes:
        options = {"to": TensorProto.FLOAT} if kind == "Cast" else {}
        model.graph.node.append(helper.make_node(kind, given.split(), [made], **options))
    return model


@pytest.mark.parametrize("way", ROUNDED)
def test_simulated_quantization_is_said(file, way):
    model = with_nodes(ROUNDED[way])
    assert len(simulated(model)) == 1
    assert not quantized(model)
    file.write_bytes(model.SerializeToString())
    (said,) = check_request(file, described(RAW), "int8", {}, {}, True)
    assert "looks like simulated quantization (1 nodes, the first is '" in said
    assert check_request(file, described(RAW), "external", {}, {}, True) == []


NOT_SIMULATED = {
    "rounding alone": [("Round", "x", "a"), ("Mul", "a s", "z")],
    "a limit far from it": [("Round", "x", "a"), ("Relu", "a", "b"), ("Clip", "b low high", "z")],
    "hard swish": [("Add", "x s", "a"), ("Clip", "a low high", "b"), ("Mul", "x b", "z")],
}


@pytest.mark.parametrize("way", NOT_SIMULATED)
def test_a_float_network_is_not_called_quantized(way):
    assert not simulated(with_nodes(NOT_SIMULATED[way]))


def test_integers_that_become_no_float_are_no_weights():
    model = with_nodes([])
    model.graph.node.append(helper.make_node("Cast", ["narrow"], ["mask"], to=TensorProto.BOOL))
    model.graph.node.append(helper.make_node("Cast", [], ["nothing"], to=TensorProto.FLOAT))
    assert not simulated(model)


def cell(tmp_path, monkeypatch, *words, model="onnx"):
    """A cell of the command, composed in this process."""
    import hydra

    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_module("conf", version_base="1.3"):
        config = hydra.compose("config", ["tracking=none", f"model={model}", *words])
    return Cell(config, list(words), sweep=False)


def spec_word(raw):
    """A description as a word of the command line."""

    def text(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return "null" if value is None else str(value)

    return f"model.spec={text(raw)}"


ASKED = ["stage=[export,quantize,build,tune,evaluate]", "training_resolution=32x48", "data=synthetic_smoke"]


def refused(tmp_path, monkeypatch, *words, raw=RAW):
    """The message of a configuration that is refused before any work."""
    onnx.save(network(), tmp_path / "given.onnx") if not (tmp_path / "given.onnx").exists() else None
    made = cell(tmp_path, monkeypatch, *ASKED, f"model.onnx={tmp_path}/given.onnx", spec_word(raw), *words)
    with pytest.raises(UserError) as caught:
        made.preflight()
    assert not list((tmp_path / "outputs").glob("default/*"))
    return str(caught.value)


def test_a_given_file_is_run_before_any_work(tmp_path, monkeypatch):
    onnx.save(network(), tmp_path / "given.onnx")
    cell(tmp_path, monkeypatch, *ASKED, f"model.onnx={tmp_path}/given.onnx", spec_word(RAW)).preflight()
    raw = changed(("fields", 1, "stride"), 8)
    raw["fields"][0]["stride"] = 8
    assert "at stride 8 are maps of 4x6" in refused(tmp_path, monkeypatch, raw=raw)
    message = refused(tmp_path, monkeypatch, raw=changed(("labels", "limbs"), [[1, 2], [2, 3]]))
    assert "model.spec.labels.limbs[1]=[2, 3]: there are 3 keypoints, 0 to 2; count from 0" in message


def test_the_decoder_is_made_before_any_work(tmp_path, monkeypatch):
    assert "do not fit a skeleton of 3 keypoints and 1 limbs" in refused(
        tmp_path, monkeypatch, raw=changed(("labels", "limbs"), [[0, 1]])
    )
    assert "the network has no output 'pafs'" in refused(tmp_path, monkeypatch, raw=ONE)
    assert "has no mirror image" in refused(
        tmp_path, monkeypatch, "flip=true", raw=changed(("labels", "names"), ["left_a", "right_a", "c"])
    )


@pytest.mark.parametrize("given", ["+model.spec.dynamic=[]", "model.spec.dynamic=[]"])
def test_free_axes_are_an_option(tmp_path, monkeypatch, given):
    assert "batch=2: " in refused(tmp_path, monkeypatch, given, "batch=2", raw={k: v for k, v in RAW.items() if k != "dynamic"})


@pytest.mark.parametrize(
    ("word", "message"),
    [("model.spec=null", "^model.spec=null: give"), ("model.spec.input=5", r"^model.spec(.input=5|\.input=5: give it as)")],
)
def test_what_is_no_description_is_refused_before_any_work(tmp_path, monkeypatch, word, message):
    onnx.save(network(), tmp_path / "given.onnx")
    with pytest.raises(UserError, match=message):
        cell(tmp_path, monkeypatch, *ASKED, f"model.onnx={tmp_path}/given.onnx", word).preflight()


def test_a_plan_is_described_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "given.plan").write_bytes(b"plan")
    words = ["stage=[build]", "backend=tensorrt", f"model.plan={tmp_path}/given.plan"]
    made = cell(tmp_path, monkeypatch, *words, "model.spec.input.order=GRB", model="plan")
    with pytest.raises(UserError, match="model.spec.input.order=GRB: choose RGB, BGR"):
        made.preflight()


def test_an_unusual_mean_is_said(tmp_path, monkeypatch, capsys):
    onnx.save(network(), tmp_path / "given.onnx")
    raw = changed(("input",), {"name": "image", "range": 255.0, "mean": [0.5, 0.5, 0.5], "multiple": 8})
    cell(tmp_path, monkeypatch, *ASKED, f"model.onnx={tmp_path}/given.onnx", spec_word(raw)).preflight()
    assert (
        "warning: model.spec.input.mean=[0.5, 0.5, 0.5] lies far from the middle of 0 to range=255" in capsys.readouterr().err
    )


# ---------- descriptions ----------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("input", "order"), "grb", "input.order=grb: choose RGB, BGR"),
        (("input", "order"), None, "input.order=null: choose RGB, BGR"),
        (("input", "layout"), "NCWH", "input.layout=NCWH: choose NCHW, NHWC"),
        (("input", "dtype"), "int8", "input.dtype=int8: choose float32, float16, uint8"),
        (("input", "dtype"), "uint8", "input.dtype=uint8: the network takes pixels without normalisation; give range=255"),
        (("input", "channels"), 4, "input.channels=4: choose 3"),
        (("input", "size"), "big", "input.size=big: give HEIGHTxWIDTH"),
        (("fields", 0, "axes"), "HWC", r"fields\[0\].axes=HWC: choose CHW, CX"),
        (("fields", 0, "axes"), "HW", r"fields\[0\].channels=\d+: a map of class indices"),
        (("fields", 0, "dtype"), "float64", r"fields\[0\].dtype=float64: choose float32"),
        (("fields", 0, "tensor"), 3, r"fields\[0\].tensor=3: give the output's name"),
        (("input", "mean"), [1, 2], r"input.mean=\[1, 2\]: 2 numbers; give one, or three"),
        (("input", "mean"), "128", "input.mean=128: choose a number"),
        (("input", "mean"), [float("nan")] * 3, r"input.mean\[0\]=nan: choose a number"),
        (("input", "std"), [1, 0, 1], r"input.std\[1\]=0: choose a number from 1e-06"),
        (("input", "std"), -1, "input.std=-1: choose a number"),
        (("input", "range"), 0, "input.range=0: choose a number"),
        (("input", "range"), True, "input.range=True: choose a number"),
        (("input", "pad"), 300, "input.pad=300: choose a whole number from 0 to 255"),
        (("input", "multiple"), 0, "input.multiple=0: choose a whole number from 1"),
        (("input", "multiple"), "8", "input.multiple=8: choose a whole number"),
        (("input", "offset"), -1, "input.offset=-1: choose a whole number from 0"),
        (("input", "name"), "", "input.name=: choose a name"),
        (("input", "names"), "x", "input.names: no such key; did you mean 'name'"),
        (("fields", 0, "stride"), 0, r"fields\[0\].stride=0: choose a whole number from 1"),
        (("fields", 0, "stride"), 4.5, r"fields\[0\].stride=4.5: choose a whole number"),
        (("fields", 1, "channels"), -1, r"fields\[1\].channels=-1: choose a whole number from 1"),
        (("fields", 1, "shift"), float("inf"), r"fields\[1\].shift=inf: choose a number"),
        (("fields", 1, "name"), "heatmaps", "fields.name: 'heatmaps' is there 2 times"),
        (("fields", 1, "name"), "image", "input.name=image: a field has this name, too"),
        (("fields", 1), {"name": "pafs", "stride": 4}, r"fields\[1\].channels is missing"),
        (("fields",), [], r"fields=\[\]: give each output"),
        (("fields",), {"name": "x"}, "fields=.*: give a list"),
        (("labels", "names"), ["a", "a", "b"], "labels.names: 'a' is there 2 times"),
        (("labels", "names"), "abc", "labels.names=abc: give a list"),
        (("labels", "limbs"), [[1, 2], [2, 3]], r"labels.limbs\[1\]=\[2, 3\]: there are 3 keypoints, 0 to 2; count from 0"),
        (("labels", "limbs"), [[0, -1]], r"labels.limbs\[0\]=\[0, -1\]: there are 3"),
        (("labels", "limbs"), [[0, 0]], r"labels.limbs\[0\]=\[0, 0\]: joins 'a' with itself"),
        (("labels", "limbs"), [[0, 1, 2]], r"labels.limbs\[0\]=\[0, 1, 2\]: give two indices"),
        (("labels", "limbs"), [[0, 1.5]], r"labels.limbs\[0\]=\[0, 1.5\]: give two indices"),
        (("labels", "sigmas"), [0.1, 0.1], "labels.sigmas: 2 numbers for 3 keypoints"),
        (("labels", "sigmas"), [0.1, 0, 0.1], r"labels.sigmas\[1\]=0: choose a number"),
        (("labels", "sigma"), [0.1], "labels.sigma: no such key; did you mean 'sigmas'"),
        (("labels",), "openpose_81", "labels=openpose_81: unknown; did you mean 'openpose_18'"),
        (("labels",), {"names": ["a"], "colours": [[0, 0, 256]]}, r"labels.colours\[0\]=256: choose a whole number"),
        (("labels",), {"names": ["a", "b"], "colours": [[0, 0, 0]]}, "labels.colours: 1 for 2 classes"),
        (("labels",), 5, "labels=5: give it as"),
        (("dynamic",), ["bach"], "dynamic=bach: choose batch, height, width"),
        (("dynamic",), "batch", "dynamic=batch: give a list"),
        (("input",), None, "input is missing"),
        (("feilds",), [], "feilds: no such key; did you mean fields"),
    ],
)
def test_every_value_of_a_description_is_checked(path, value, message):
    with pytest.raises(UserError, match=f"^model.spec.{message}") as caught:
        described(changed(path, value))
    assert "conf/model/onnx.yaml" in str(caught.value) or "labels" in str(caught.value)


@pytest.mark.parametrize("raw", [None, 5, "openpose", [], {}])
def test_what_is_no_description_is_refused(raw):
    with pytest.raises(UserError, match="^model.spec"):
        described(raw)


def test_what_can_only_mean_one_thing_is_taken():
    spec = described(changed(("input",), {"name": "image", "order": "bgr", "mean": 0.5, "std": [0.25]}))
    assert spec.input == InputSpec("image", "BGR", mean=(0.5,) * 3, std=(0.25,) * 3)
    _, factor, offset = spec.input.form()
    assert factor.shape == offset.shape == (3,)
    assert NetworkSpec.from_json(spec.to_json()) == spec
    none = described(changed(("labels",), {"names": ["a", "b", "c"], "sigmas": [0.1] * 3}))
    assert none.skeleton.limbs == ()
    bare, empty = (described(changed(("labels",), {"names": ["a", "b", "c"], **more})) for more in ({}, {"sigmas": []}))
    assert bare == empty
    assert bare.skeleton.oks_sigmas == (0.05,) * 3


def test_stored_descriptions_read_and_write_as_they_did():
    spec = NetworkSpec(InputSpec("image", "BGR", 255.0, multiple=16), (OutputSpec("heatmaps", 8, 19),), OPENPOSE_18)
    text = spec.to_json()
    assert text.startswith(
        '{"dynamic": ["batch", "height", "width"], '
        '"fields": [{"channels": 19, "name": "heatmaps", "shift": 0.0, "stride": 8}], '
        '"input": {"dtype": "float32", "layout": "NCHW", "mean": [0.0, 0.0, 0.0], "multiple": 16, "name": "image", '
        '"offset": 0, "order": "BGR", "pad": 128, "range": 255.0, "std": [1.0, 1.0, 1.0]}, '
        '"labels": {"limbs": [[1, 8], [8, 9],'
    )
    assert NetworkSpec.from_json(text).to_json() == text
    ints = described(changed(("input", "mean"), [128, 128, 128]))
    assert '"mean": [128, 128, 128]' in ints.to_json()


@pytest.mark.parametrize(
    ("options", "doubtful"),
    [
        ({}, 0),
        ({"range": 255.0}, 0),
        ({"range": 255.0, "mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, 0),
        ({"range": 255.0, "mean": (128, 128, 128), "std": (256, 256, 256)}, 0),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, 0),
        ({"range": 255.0, "mean": (0.5, 0.5, 0.5), "std": (127, 127, 127)}, 1),
        ({"range": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, 2),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, 2),
    ],
)
def test_means_of_another_range_are_doubted(options, doubtful):
    assert len(InputSpec("image", **options).doubts) == doubtful


def test_damaged_descriptions_in_files_are_refused(file):
    model = network()
    helper.set_model_props(model, {SPEC_KEY: '{"input": 3}'})
    onnx.save(model, file)
    with pytest.raises(UserError, match="given.onnx: not a network description: fields is missing"):
        read_spec(file)
    with pytest.raises(UserError, match="given.onnx: not a network description"):
        OnnxRuntime().load(file)


# ---------- compiled code ----------

SPEC, _ = named(described(RAW))


def maps(K=3, L=4, h=8, w=12):
    return {"heatmaps": np.zeros((1, K, h, w), np.float32), "pafs": np.zeros((1, L, h, w), np.float32)}


VIEW = WholeImage().views(SIZE, SIZE, SPEC.input)


@pytest.mark.parametrize("fields", [maps(K=2), maps(L=3), maps(L=6), maps(h=0), {k: v[:, 0] for k, v in maps().items()}])
def test_fields_that_are_short_never_reach_compiled_code(fields):
    with pytest.raises(ValueError, match="are not the maps"):
        HeatmapPafDecoder(SPEC).decode(fields, VIEW)


@pytest.mark.parametrize("fields", [maps(K=2), maps(h=0), {"heatmaps": np.zeros((1, 96), np.float32)}])
def test_heatmaps_that_are_short_never_reach_compiled_code(fields):
    with pytest.raises(ValueError, match="are not the maps"):
        TopDownDecoder(SPEC).decode(fields, VIEW)


@pytest.mark.parametrize(
    "options",
    [
        {"heatmap_threshold": float("nan")},
        {"paf_threshold": float("inf")},
        {"min_score": "high"},
        {"box_margin": -1},
        {"box_margin": float("nan")},
        {"min_keypoints": 2.5},
        {"max_peaks": 0},
        {"max_peaks": "many"},
        {"complete_poses": "yes"},
        {"score_weights": [float("nan")] * 7},
        {"score_weights": [1.0]},
    ],
)
def test_numbers_of_the_decoder_are_checked(options):
    with pytest.raises(ValueError, match=f"decoder.{next(iter(options))}"):
        HeatmapPafDecoder(SPEC, **options)


@pytest.mark.parametrize("options", [{"sigma": float("nan")}, {"sigma": "2"}, {"keypoint_threshold": float("nan")}])
def test_numbers_of_the_top_down_decoder_are_checked(options):
    with pytest.raises(ValueError, match=f"decoder.{next(iter(options))}"):
        TopDownDecoder(SPEC, **options)


def test_pafs_need_limbs():
    fields = (OutputSpec("heatmaps", 4, 2), OutputSpec("pafs", 4, 2))
    with pytest.raises(ValueError, match="labels.limbs is missing"):
        HeatmapPafDecoder(NetworkSpec(InputSpec("image"), fields, Skeleton(("a", "b"), (), (0.1, 0.1))))


def test_a_skeleton_of_a_neck_alone_is_scored():
    skeleton = Skeleton(("neck", "neck2"), ((0, 1),), (0.1, 0.1))
    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 2), OutputSpec("pafs", 4, 2)), skeleton)
    (found,) = HeatmapPafDecoder(spec).decode(maps(2, 2), VIEW)
    assert len(found.keypoints) == 0


def test_pixels_of_other_channels_never_reach_compiled_code():
    with pytest.raises(ValueError, match=r"images \[1, 8, 8, 4\] are not RGB"):
        normalise(np.zeros((1, 8, 8, 4), np.uint8), SPEC.input)
    for out in (np.zeros(5, np.float32), np.zeros((1, 3, 8, 8), np.float16)):
        with pytest.raises(ValueError, match=r"does not take an input \[1, 3, 8, 8\] of float32"):
            normalise(np.zeros((1, 8, 8, 3), np.uint8), SPEC.input, out)


def test_framings_check_their_numbers():
    for padding in (0, float("nan"), "wide", 100):
        with pytest.raises(ValueError, match="framing.padding"):
            PersonCrops(padding)
    with pytest.raises(ValueError, match=r"scales\[0\]=nan"):
        WholeImage(scales=(float("nan"),))
    with pytest.raises(ValueError, match="a person's box is not finite"):
        PersonCrops().views(SIZE, SIZE, SPEC.input, Boxes(np.array([[0, 0, np.nan, 1]])))


def test_an_engine_that_is_not_as_described_is_named(file):
    model = network()
    wrong = changed(("fields", 0, "channels"), 5)
    helper.set_model_props(model, {SPEC_KEY: described(wrong).to_json()})
    onnx.save(model, file)
    with OnnxRuntime().load(file) as runner:
        with pytest.raises(UserError, match=r"output 'heatmaps' is \[1, 3, 8, 12\] for 1 images, .* says 5 channels"):
            runner(IMAGES)
        with pytest.raises(UserError, match=r"does not run at \[1, 4, 32, 48\]"):
            runner(np.zeros((1, 4, 32, 48), np.float32))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bottomup_posenet_mobilenetv1/model_qdq.onnx", "already quantized"),
        ("seg_deeplabv3_mnv2_dm05/model_qdq.onnx", "already quantized"),
    ],
)
def test_published_quantized_files_stand_for_no_float_network(name, message):
    with pytest.raises(UserError, match=message):
        asked(REAL / "weights" / name)
