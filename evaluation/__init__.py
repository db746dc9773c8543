"""Decoding and measuring: everything between a network's fields and a figure. Imports nothing of `pipeline`."""
