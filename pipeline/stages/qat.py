"""qat: retrain the exported network with INT8's rounding in the loop."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import onnx
import torch
from annotated_types import Interval

from pipeline.backends.macs import macs
from pipeline.calibration.feed import calibration_feed
from pipeline.contracts import Objective, Splits
from pipeline.onnx_files.export import stamp
from pipeline.onnx_files.files import read_spec
from pipeline.quantization.precisions.int8 import Int8
from pipeline.results.job import Job
from pipeline.training.augment import Augmentation
from pipeline.training.fake_quantization import FakeQuantized
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.shard import Material
from pipeline.training.views import Views
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Qat:
    """Calibrate the input "network", then train it with its scales fixed; write model.onnx and scales.json.

    Attributes:
        data: the data set. Its train images are used.
        quantizer: quantizer that finds the scales.
        objective: training objective; None if the family has none.
        framing: framing of the calibration images.
        resolution: input size of calibration and training.
        image_dir: folder that the calibration images were sampled from.
        seed: seed of the order and the views.
        bases: framing whose base views are augmented.
        augment: augmentation of the views.
        training: options of the training.
    """

    data: Splits
    quantizer: Int8
    objective: Objective[Any] | None
    framing: Framing
    resolution: str
    image_dir: str | None
    seed: Annotated[int, Interval(ge=0, lt=2**32)]
    bases: Framing
    augment: Augmentation
    training: Training

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network" and "calibration".

        Returns:
            The losses, and the calibration's entry for the manifest.

        Raises:
            UserError: the family has no objective, or calibration or training fails.
        """
        if self.objective is None:
            raise UserError("precision=int8_qat: this family's networks are not trained here; choose precision=int8 or mixed")
        torch.manual_seed(self.seed)
        exported, size = job.inputs["network"] / "model.onnx", Resolution.parse(self.resolution)
        spec = read_spec(exported)
        if (spec.input.layout, spec.input.dtype) != ("NCHW", "float32"):
            raise UserError(
                "precision=int8_qat: training takes inputs in NCHW and float32 alone; choose precision=int8 or mixed"
            )
        chosen = job.inputs["calibration"] / "calibration.json"
        feed = calibration_feed(chosen, self.data, self.image_dir, self.framing, spec.input, size, job.cache)
        quantizer = replace(self.quantizer, _where="precision.trained_with")
        calibrated = quantizer.calibrate(exported, feed).as_in("tensorrt")  # the training rounds like TensorRT's variant
        network = FakeQuantized(calibrated.model, calibrated.placement, calibrated.scales["tensorrt"])
        material = Material(self.data, self.objective, self.bases, size, self.augment, job.cache)
        views = Views.of(material, ["train"], network, self.seed)
        network.sparse24 = network.sparse_constants()  # type: ignore[assignment]
        losses = train(network, views, self.training, job.scratch / "state.ckpt")
        del losses["curve"], losses["train_macs"]
        calibrated.save(job.out)
        model = job.out / "model.onnx"
        onnx.save(network.float_model(calibrated.model), model)
        stamp(model, spec)
        return {**losses, **calibrated.summary(), "macs": sum(macs(onnx.load(model), size, read_spec(model).input).values())}
