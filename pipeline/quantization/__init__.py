"""Quantization: make a float ONNX file into one that states its own precision."""
