"""Measure candidates: the errors of their fields, their metrics and their latency."""
