"""Describe our ONNX nodes, and make and change models that hold them."""
