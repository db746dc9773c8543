"""The backend that runs ONNX files in ONNX Runtime."""

import json
import shutil
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.onnx_files.files import ModelFiles, Shapes, read_spec
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.runners.onnxruntime import CPU, ENGINE, OnnxRuntimeRunner, load, session_options
from posepress.spec import NetworkSpec

_CONVOLUTIONS = {
    "Conv": 1,
    "DeformConv": 1,
    "FusedConv": 1,
    "NhwcFusedConv": 1,
    "ConvTranspose": 1,
    "QLinearConv": 3,
    "ConvInteger": 1,
}

_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")

_PROFILED = 5  # number of profiled runs; the shortest time of each layer counts

_PRODUCTS = {
    "Gemm": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
    "FusedGemm": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
    "MatMulInteger": 1,
}


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs typed ONNX files. It uses the variant with uint8 activations, for which ONNX Runtime has fast CPU kernels.

    Attributes:
        provider: name of an execution provider of ONNX Runtime.
    """

    kind: ClassVar[str] = "onnxruntime"
    provider: str = CPU

    def __post_init__(self) -> None:
        """Check the provider.

        Raises:
            UserError: this build of ONNX Runtime lacks the provider.
        """
        import onnxruntime

        known = onnxruntime.get_available_providers()
        if self.provider not in known:
            raise UserError(f"backend.provider={self.provider}: not in this ONNX Runtime; choose one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """Name of the backend in reports."""
        return "onnxruntime"

    @property
    def simulated(self) -> bool:
        """False: its figures are real."""
        return False

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on a GPU."""
        return self.provider != CPU

    @property
    def timeable(self) -> bool:
        """True: its latencies are real measurements."""
        return True

    def in_fp32(self) -> "OnnxRuntime":
        """Return itself, because the ONNX file determines the precision."""
        return self

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:  # noqa: ARG002
        """Copy the uint8 variant and check that it loads. ONNX Runtime optimises a network when it loads it."""
        engine = out / ENGINE
        shutil.copyfile(files.onnx["onnxruntime"], engine)
        self._session(engine, 0)
        return engine

    def _session(self, model: Path, threads: int, observed: Path | None = None) -> Any:
        """Open a session. It writes its optimised graph and a profile into the folder `observed`, if one is given."""
        import onnxruntime

        options = session_options(threads)
        if observed is not None:
            options.optimized_model_filepath = str(observed / "optimised.onnx")
            options.enable_profiling = True
            options.profile_file_prefix = str(observed / "profile")
        return onnxruntime.InferenceSession(str(model), options, providers=[self.provider])

    def adopt(self, plan: Path, spec: NetworkSpec, tensors: Mapping[str, str], out: Path) -> Path:  # noqa: ARG002
        """Refuse: engines of other programs are TensorRT plans.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model.plan={plan}: backend=onnxruntime runs no plan; choose backend=tensorrt, or model=onnx model.onnx=FILE"
        )

    def load(self, engine: Path, threads: int = 0) -> "OnnxRuntimeRunner":
        """Load an engine. With `threads` 0 on a CPU, one batch runs on each core at the same time.

        Raises:
            UserError: the file cannot be loaded, or the stage `build` did not write it.
        """
        return load(engine, self.provider, threads)

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> list[dict[str, Any]]:
        """Return the layers of the graph that ONNX Runtime has optimised, measured for one image of a resolution.

        Returns:
            A record for each node: "name", "op" and "precision" ("int8", "fp16" or "fp32"). "macs" is 0 if unknown. "us" is
            the shortest time of several runs on one thread, in microseconds. "quantized" says whether the file quantizes a
            node that ONNX Runtime computes in floating point. "reason" says why it does not compute in integers.
        """
        import onnx

        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            session = self._session(engine, 1, Path(folder))
            spec = read_spec(engine).input
            image = np.zeros(spec.shape(1, resolution), spec.dtype)
            for _ in range(_PROFILED):
                session.run(None, {session.get_inputs()[0].name: image})
            # Weights and node names are in the graph only, output shapes and times in the profile only.
            events = json.loads(Path(session.end_profiling()).read_text())
            graph = onnx.load(Path(folder) / "optimised.onnx").graph
        made: dict[str, tuple[list[int], list[int]]] = {}
        times: dict[str, float] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["name"].removesuffix("_kernel_time")
                times[node] = min(times.get(node, np.inf), float(event["dur"]))
                shapes = [event["args"].get(f"{side}_type_shape") for side in ("input", "output")]
                if all(shapes):
                    made[node] = tuple(next(iter(shape[0].values())) for shape in shapes)
        constants = {i.name: i for i in graph.initializer}
        given = _weights(onnx.load(engine).graph)
        makers = {output: node.op_type for node in graph.node for output in node.output}
        takers: dict[str, set[str]] = {}
        for node in graph.node:
            for name in node.input:
                takers.setdefault(name, set()).add(node.op_type)
        return [
            {
                **_layer(node, constants, given, made.get(node.name)),
                "us": times.get(node.name, 0.0),
                "quantized": (asked := _quantized(node, constants, makers, takers)),
                "reason": _reason(node, makers, asked),
            }
            for node in graph.node
        ]


def _quantized(node: Any, constants: Container[str], makers: Mapping[str, str], takers: Mapping[str, set[str]]) -> bool:
    """Whether a node computes in floating point although the file quantizes it."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    if node.op_type in (*_CONVOLUTIONS, *_PRODUCTS):
        return len(node.input) > 1 and makers.get(node.input[1]) == "DequantizeLinear"
    given = [makers.get(name) for name in node.input if name and name not in constants]
    taken = set().union(*(takers.get(name, {"the result"}) for name in node.output))
    return bool(given) and set(given) == {"DequantizeLinear"} and taken == {"QuantizeLinear"}


def _reason(node: Any, makers: Mapping[str, str], quantized: bool) -> str:
    """Return why a layer with weights, or another quantized layer, does not compute in integers. Empty for other layers."""
    if node.op_type not in (*_CONVOLUTIONS, *_PRODUCTS):
        return f"ONNX Runtime has no INT8 kernel for {node.op_type} in this position" if quantized else ""
    if _integer(node.op_type):
        return ""
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime has no INT8 kernel for ConvTranspose"
    dequantized = [makers.get(name) == "DequantizeLinear" for name in node.input[:2]]
    if not any(dequantized):
        return "not quantized: it is excluded, or no layer next to it is quantized"
    if not all(dequantized):
        return "only its weights are quantized" if dequantized[1] else "only its input is quantized"
    return "its output is not quantized, so that it cannot be fused into one integer kernel"


def _integer(op: str) -> bool:
    return op.startswith("QLinear") or op.endswith("Integer") or op == "QGemm"


def _weights(graph: Any) -> dict[str, int]:
    """Return the number of weights of each float convolution, by the name of its output or of its fused activation's output."""
    constants = {i.name: int(np.prod(i.dims)) for i in graph.initializer}
    counts = {n.output[0]: constants[n.input[1]] for n in graph.node if n.op_type == "Conv" and n.input[1] in constants}
    return counts | {n.output[0]: counts[n.input[0]] for n in graph.node if n.op_type in _FUSED and n.input[0] in counts}


def _layer(
    node: Any, constants: Mapping[str, Any], given: Mapping[str, int], made: tuple[Sequence[int], Sequence[int]] | None
) -> dict[str, Any]:
    """Return a record of an optimised node.

    Args:
        node: the node.
        constants: initializers of the optimised graph, by name.
        given: number of weights before the optimisation, by output tensor.
        made: shapes of the node's input and output; None if the profile lacks them.
    """
    import onnx

    place = {**_CONVOLUTIONS, **_PRODUCTS}.get(node.op_type)
    weights = constants.get(node.input[place]) if place is not None and len(node.input) > place else None
    half = weights is not None and weights.data_type == onnx.TensorProto.FLOAT16
    macs = 0
    if weights is not None and made is not None:
        source, result = made
        # The blocked layout names a node after its tensor and pads its channels; the padding must not count as work.
        count = given.get(node.name.removesuffix("_nchwc"), int(np.prod(weights.dims)))
        across = weights.dims[0] if node.op_type in _CONVOLUTIONS else weights.dims[-1]
        macs = count * int(np.prod(source if node.op_type == "ConvTranspose" else result)) // max(int(across), 1)
    return {
        "name": node.name,
        "op": node.op_type,
        "precision": "int8" if _integer(node.op_type) else "fp16" if half else "fp32",
        "macs": macs,
    }
