"""Forwards to where skeletons are now, for one release."""

from posepress.moved import forward

__getattr__ = forward("evaluation.skeletons", {"*": "posepress.skeletons"})
