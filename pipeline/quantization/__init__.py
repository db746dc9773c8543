"""From a float ONNX file to one whose precision is written into it."""
