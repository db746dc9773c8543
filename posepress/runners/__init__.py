"""Loaded engines, one file a library."""
