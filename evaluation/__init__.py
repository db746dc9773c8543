"""Metrics, intervals, latency and power of engines. This package imports nothing from `pipeline`."""
