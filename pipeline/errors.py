"""The old address of `posepress.errors`, kept for one release."""

from posepress.moved import forward

__getattr__ = forward("pipeline.errors", {"*": "posepress.errors"})
