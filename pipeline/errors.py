"""Forwards to where errors are now, for one release."""

from posepress.moved import forward

__getattr__ = forward("pipeline.errors", {"*": "posepress.errors"})
