"""Posepress: from a trained pose network to the smallest, fastest engine that still finds the people."""

import os

MOST_PIXELS = 100_000_000  # of an image; OpenCV, which reads this when it is first imported, refuses larger ones undecoded
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))
