"""Metrics of predictions, one file for each."""
