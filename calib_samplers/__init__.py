"""Choosing calibration images. Takes arrays, reads no files, imports nothing of `pipeline`."""
