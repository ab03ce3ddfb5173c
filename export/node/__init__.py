"""Describe our ONNX nodes: their operators, their attributes, and the uses of an operator."""
