"""ONNX files: written, adopted, cut and executed."""
