"""precision=external: a network that was quantized elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import FLAVOURS, read_spec
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe
from posepress.errors import UserError, first_line
from posepress.spec import SPEC_KEY


def _check_steps(model: onnx.ModelProto, where: str) -> None:
    """Check that constant scales of Q/DQ nodes are positive numbers.

    Raises:
        UserError: a scale is not positive; the message names its tensor.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: option.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for option in node.attribute
        if option.name == "value"
    }
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in constants:
            steps = np.asarray(onnx.numpy_helper.to_array(constants[node.input[1]]), np.float64)
            if not (np.isfinite(steps) & (steps > 0)).all():
                wrong = steps.ravel()[~(np.isfinite(steps) & (steps > 0)).ravel()][0]
                raise UserError(f"{where}: a scale of '{node.input[0]}' is {wrong:g}; quantize the network again")


@dataclass(frozen=True)
class External:
    """A network that was quantized elsewhere: an ONNX file with Q/DQ nodes, used without changes.

    Attributes:
        file: an ONNX file with the fields of the exported network.
    """

    file: str

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Copy the file as both runtime variants, with the description of the exported network.

        Raises:
            UserError: the file is no ONNX file, its input or fields differ, or nothing in it is quantized.
        """
        where = f"precision.file={self.file}"
        try:
            model = onnx.load(self.file)
            onnx.checker.check_model(model)
        except Exception as error:
            raise UserError(f"{where}: not a valid ONNX file ({first_line(error)}); give another file") from error
        spec = read_spec(onnx_file)
        outputs = {o.name for o in model.graph.output}
        missing = [field.name for field in spec.fields if field.name not in outputs]
        if missing or model.graph.input[0].name != spec.input.name:
            raise UserError(
                f"{where}: takes '{model.graph.input[0].name}' and returns {sorted(outputs)}; the exported network takes "
                f"'{spec.input.name}' and returns {[field.name for field in spec.fields]}: quantize {onnx_file} instead"
            )
        pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
        if not pairs:
            raise UserError(f"{where}: no DequantizeLinear node in it, so nothing is quantized; give a Q/DQ file")
        _check_steps(model, where)
        onnx.helper.set_model_props(
            model, {**{e.key: e.value for e in model.metadata_props if e.key != SPEC_KEY}, SPEC_KEY: spec.to_json()}
        )
        candidate = Candidate(dict.fromkeys(FLAVOURS, model))
        candidate.write(out)
        return {"precision": "external", "dequantized": pairs, **Probe.summary(probe, candidate)}
