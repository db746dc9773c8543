"""Calibration images as network inputs."""
