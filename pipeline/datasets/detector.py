"""A detector that runs, for networks that see one person at a time."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from pipeline.progress import say
from pipeline.results.content import sha256
from posepress.contracts import Samples
from posepress.decoders.boxes import BoxDecoder
from posepress.decoders.sets import Form
from posepress.description import Description
from posepress.errors import UserError
from posepress.framing.whole_image import KeepAspectRatioMode, WholeImage
from posepress.geometry import Interpolation
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.runners.onnxruntime import CPU
from posepress.spec import NetworkSpec


def _renamed(option: re.Match[str]) -> str:
    """The detector's option in place of the network's, in a message."""
    return f"detector.{option[1].replace('onnx=', 'file=')}"


@dataclass(frozen=True)
class Detector:
    """A network that finds people's boxes, for networks that see one person at a time.

    Attributes:
        file: an ONNX file, or the folder of a network that the stage `build` or `export` wrote. In a configuration also the
            address of such a folder below `outputs`.
        spec: description of the file, as model.spec; None reads it from the file's metadata.
        outputs: names of outputs in the file that differ from the description's.
        resolution: size of the detector's input; None takes the file's own, if it has one.
        keep_aspect_ratio_mode: as the option of this name for whole images.
        interpolation: "linear" or "cubic".
        form: "xyxy" for boxes by corners, "cxcywh" by middle and size.
        category: class to find, by name or number.
        score_threshold: least score of a box.
        nms_iou: greatest intersection over union with a better box; 1 if the network suppresses boxes itself.
        max_detections: greatest number of boxes in an image.
    """

    file: str
    spec: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None
    resolution: str | None = None
    keep_aspect_ratio_mode: KeepAspectRatioMode | None = "pad_image_input"
    interpolation: Interpolation = "linear"
    form: Form = "xyxy"
    category: int | str = 0
    score_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.05
    nms_iou: Annotated[float, Interval(gt=0, le=1)] = 0.6
    max_detections: Annotated[int, Interval(ge=1, le=10000)] = 100

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The detector's label in an address: the name of its file, or of the file's folder, and options that differ."""
        file = Path(str(options.get("file")))
        name = file.parent.name if file.name in ("model.onnx", "engine.onnx") else file.name.removesuffix(".onnx")
        words = [re.sub(r"[^\w.+=-]", "-", name)]
        words += [f"s{options['score_threshold']}"] if options.get("score_threshold", 0.05) != 0.05 else []
        return "-".join(words)

    @property
    def path(self) -> Path:
        """The detector's ONNX file.

        Raises:
            UserError: there is none.
        """
        given = Path(self.file)
        files = [given] if given.is_file() else [given / name for name in ("engine.onnx", "model.onnx")]
        there = next((file for file in files if file.is_file()), None)
        if there is None:
            raise UserError(f"detector.file={self.file}: no such file; give an ONNX file, or a folder of build or export")
        return there

    @property
    def identity(self) -> str:
        """Digest of the file, of its weights in further files, and of all options."""
        from pipeline.onnx_files.cut import external_files

        options = {name: value for name, value in vars(self).items() if name != "file"}
        weights = {name: sha256(file) for name, file in external_files(self.path).items() if file.is_file()}
        what = [sha256(self.path), options, *([weights] if weights else [])]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def framing(self) -> WholeImage:
        """How an image becomes the detector's input."""
        return WholeImage(self.keep_aspect_ratio_mode, interpolation=self.interpolation)

    def decoder(self, spec: NetworkSpec) -> BoxDecoder:
        """The decoder of the detector's outputs.

        Raises:
            UserError: the outputs do not fit.
        """
        try:
            return BoxDecoder(
                spec, self.form, self.category, self.score_threshold, self.nms_iou, max_detections=self.max_detections
            )
        except ValueError as error:
            raise UserError(f"detector.file={self.file}: {error}") from error

    def prepared(self, cache: Path) -> tuple[Path, Resolution]:
        """The detector in the form of our exports, with its description in the metadata, and its input size.

        Args:
            cache: folder that keeps adopted files.

        Raises:
            UserError: the file does not fit its description, or has no size of its own and none is given.
        """
        from pipeline.onnx_files.files import read_spec

        if self.spec is None:
            try:
                spec = read_spec(self.path)
            except UserError as error:
                raise UserError(
                    f"detector.file={self.file}: {error}; a detector of another project needs the name of its layout: "
                    "detector=yolo, detector=faster_rcnn or detector=boxes, with detector.file=FILE"
                ) from error
            return self.path, self._size(spec)
        import onnx

        from pipeline.onnx_files.adopt import adopt
        from pipeline.onnx_files.export import stamp

        try:
            adopted = adopt(self.path, self.spec, self.outputs, Resolution.parse(self.resolution or "640x640"))
        except UserError as error:
            raise UserError(re.sub(r"\bmodel\.(onnx=|spec|outputs)", _renamed, str(error))) from error
        size = self._size(adopted.spec)
        kept = cache / "detectors" / f"{self.identity[:16]}.onnx"
        if not kept.exists():
            for note in adopted.notes:
                say(f"detector.file={self.file}: {note}")
            kept.parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept.with_suffix(f".{os.getpid()}.onnx")
            onnx.save(adopted.model, unfinished)
            stamp(unfinished, adopted.spec)
            unfinished.replace(kept)
        return kept, size

    def description(self, cache: Path) -> Description:
        """How to run the detector as a model of its own.

        Args:
            cache: folder that keeps adopted files.
        """
        file, size = self.prepared(cache)
        framing, decoder = self.framing, BoxDecoder
        options = {
            "form": self.form, "category": self.category, "score_threshold": self.score_threshold, "nms_iou": self.nms_iou,
            "max_detections": self.max_detections,
        }  # fmt: skip
        return Description(
            file,
            CPU,
            size,
            1,
            {"_target_": f"{WholeImage.__module__}.{WholeImage.__qualname__}", **vars(framing)},
            {"_target_": f"{decoder.__module__}.{decoder.__qualname__}", **options},
        )

    def _size(self, spec: NetworkSpec) -> Resolution:
        """The input's size: the one that the file fixes, or the option's.

        Raises:
            UserError: there is neither.
        """
        if spec.input.size is None and self.resolution is None:
            raise UserError(
                f"detector.file={self.file}: takes inputs of every size; give detector.resolution=HEIGHTxWIDTH, the size "
                "that it was trained for"
            )
        return spec.input.size or Resolution.parse(str(self.resolution))

    def timed(self, image: NDArray[np.uint8], threads: int, cache: Path) -> Callable[[], None]:
        """A call that finds the boxes in an image, for timing.

        Args:
            image: RGB [H, W, 3].
            threads: number of CPU threads.
            cache: folder that keeps adopted files.
        """
        from pipeline.backends.onnxruntime import OnnxRuntime
        from posepress.pixels import frame

        file, size = self.prepared(cache)
        runner = OnnxRuntime().load(file, threads)
        decoder, spec = self.decoder(runner.spec), runner.spec.input

        def call() -> None:
            (view,) = self.framing.views(Resolution(*image.shape[:2]), size, spec)
            decoder.decode(runner(runner.upload(frame(image, view, spec)[None])), [view])

        return call

    def boxes(self, images: Samples[Any], digest: str, cache: Path) -> dict[str, Boxes]:
        """The boxes in each image, from the cache or found now.

        Args:
            images: the images.
            digest: of the images.
            cache: folder that keeps boxes and adopted files.
        """
        from pipeline.backends.onnxruntime import OnnxRuntime
        from pipeline.predictions import shown as progress
        from pipeline.results.fingerprint import closure, digest_of_code
        from posepress.predict import Watch, predict
        from posepress.results import load_results, save_results

        code = digest_of_code(closure([__name__, OnnxRuntime.__module__, predict.__module__]))
        what = f"{self.identity} {digest} {code} {version('onnxruntime')}"
        kept = cache / "boxes" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"
        if kept.exists():
            return load_results(kept, Boxes)
        file, size = self.prepared(cache)
        watch = Watch()
        with OnnxRuntime().load(file) as runner:
            found = predict(images, runner, self.framing, self.decoder(runner.spec), size, watch=watch)
            boxes = [(sample.id, own) for sample, own in progress(found, watch, "detecting people", len(images))]
        save_results(kept, boxes)
        return dict(boxes)
