"""Reading and changing ONNX graphs: weights, shapes, batch axes."""
