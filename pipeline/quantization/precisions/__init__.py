"""Precisions: one module for each choice of the group `precision`."""
