"""The former module of skeletons; it forwards to their new module for one release."""

from posepress.moved import forward

__getattr__ = forward("evaluation.skeletons", {"*": "posepress.skeletons"})
