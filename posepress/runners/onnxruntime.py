"""Runner of ONNX Runtime sessions."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from posepress.errors import UserError, first_line
from posepress.spec import SPEC_KEY, Array, Fields, NetworkSpec

ENGINE = "engine.onnx"

CPU = "CPUExecutionProvider"


def session_options(threads: int) -> Any:
    """Options of a session with a number of CPU threads; 0 leaves the choice to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def load(engine: Path, provider: str = CPU, threads: int = 0) -> "OnnxRuntimeRunner":
    """Load an engine. With `threads` 0 on a CPU, one batch runs on each core at the same time.

    Args:
        engine: ONNX file that the stage `build` wrote.
        provider: name of an execution provider of ONNX Runtime.
        threads: number of CPU threads for one batch.

    Raises:
        UserError: the file cannot be loaded, or has no description of the network in its metadata.
    """
    import onnxruntime

    if provider not in (known := onnxruntime.get_available_providers()):
        raise UserError(f"{engine}: made for {provider}, which this ONNX Runtime lacks; it has {', '.join(known)}")
    workers = (os.cpu_count() or 1) if threads == 0 and provider == CPU else 1
    try:
        options = session_options(1 if workers > 1 else threads)
        session = onnxruntime.InferenceSession(str(engine), options, providers=[provider])
    except Exception as error:
        what = first_line(error)
        raise UserError(f"{engine}: ONNX Runtime cannot load it ({what}); build it again with force=true") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if SPEC_KEY not in metadata:
        raise UserError(f"{engine}: no network description in its metadata; build it with the stage 'build'")
    try:
        spec = NetworkSpec.from_json(metadata[SPEC_KEY])
    except ValueError as error:
        raise UserError(f"{engine}: {error}; build it with the stage 'build'") from error
    return OnnxRuntimeRunner(session, spec, workers)


class OnnxRuntimeRunner:
    """A loaded ONNX file."""

    def __init__(self, session: Any, spec: NetworkSpec, workers: int = 1) -> None:
        self.session, self.spec, self.workers = session, spec, workers
        self._names = [field.name for field in spec.fields]

    def __enter__(self) -> "OnnxRuntimeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None

    def upload(self, images: NDArray[Any]) -> Array:
        """Convert images to the network's input form, in host memory."""
        from posepress.pixels import normalise  # numba, which only a run needs

        return normalise(images, self.spec.input)

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Return the fields, which are in host memory already."""
        return fields

    def __call__(self, images: Array) -> dict[str, NDArray[Any]]:
        """Run the network on uploaded images.

        Raises:
            UserError: the network does not accept the images, or a field differs from its description.
        """
        try:
            returned = self.session.run(self._names, {self.spec.input.name: images})
        except Exception as error:
            first = first_line(error)
            raise UserError(
                f"the network does not run at {list(images.shape)} ({first}); choose an input size and a batch that it accepts"
            ) from error
        for field, values in zip(self.spec.fields, returned, strict=True):
            if (field.axes and len(values) != len(images)) or not field.holds(values.shape):
                raise UserError(
                    f"the network's output '{field.name}' is {list(values.shape)} for {len(images)} images, and its "
                    f"description says {field.channels} channels, {field.form}; correct model.spec and export it again"
                )
        return dict(zip(self._names, returned, strict=True))
