"""Choice of calibration images. This package takes arrays, reads no files and imports nothing from `pipeline`."""
