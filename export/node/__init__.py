"""Describe our ONNX nodes, and models that hold them."""
