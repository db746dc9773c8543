"""Posepress: from a trained pose network to the smallest, fastest engine that still finds the people."""

__version__ = "0.1.0"
