"""Framings: they choose which part of an image becomes a network input."""
