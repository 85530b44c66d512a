"""ONNX Runtime sessions and execution providers."""
