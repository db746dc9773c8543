"""Decoders: they turn a network's outputs into predictions."""
