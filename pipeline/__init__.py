"""Posepress turns a trained pose network into the smallest and fastest engine that keeps its accuracy."""

import os

# Largest image that is decoded, in pixels. OpenCV reads this variable at its first import and refuses larger images.
MOST_PIXELS = 100_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))
