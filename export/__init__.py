"""Export of the recurrent decode path to ONNX."""
