"""Candidates measured: their fields, their figures, their latency."""
