"""Runners of loaded engines, one file for each library."""
