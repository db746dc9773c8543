"""Run an engine on images. Users import this package, and packages for devices contain it.

import posepress

with posepress.load("outputs/demo/build/ADDRESS") as model:
poses = model("photo.jpg")
"""

import os
from typing import TYPE_CHECKING, Any

from posepress.image_headers import MOST_PIXELS

if TYPE_CHECKING:
    from posepress.model import Model, load

__all__ = ["Model", "load"]

# OpenCV reads this variable at its first import and refuses larger images.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))


def __getattr__(name: str) -> Any:
    """Import the model at its first use, so that `import posepress` itself is quick."""
    if name in ("Model", "load"):
        from posepress import model

        return getattr(model, name)
    raise AttributeError(f"module 'posepress' has no attribute '{name}'")
