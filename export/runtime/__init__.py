"""Run models in onnxruntime."""
