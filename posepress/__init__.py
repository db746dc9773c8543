"""Run an engine on images. Users import this package, and packages for devices contain it.

`posepress.load(PATH)` returns a model, and `model("photo.jpg")` the people in a photo, with their points in pixels.
"""

import os
from importlib import import_module
from typing import Any

# OpenCV reads this variable at its first import and refuses larger images; image_headers.MOST_PIXELS is the same number.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "100000000")


def __getattr__(name: str) -> Any:
    """Import the model at its first use: `import posepress` is quick, and no result depends on all of posepress."""
    if name in ("Model", "load"):
        return getattr(import_module("posepress.model"), name)
    raise AttributeError(f"module 'posepress' has no attribute '{name}'")
