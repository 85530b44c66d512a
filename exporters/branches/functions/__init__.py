"""ONNX functions that the branches call."""
