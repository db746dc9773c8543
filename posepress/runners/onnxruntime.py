"""Runner of ONNX Runtime sessions."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from posepress.errors import UserError, first_line
from posepress.spec import Array, Fields, NetworkSpec

ENGINE = "engine.onnx"


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
