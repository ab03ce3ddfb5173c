"""Run the kernels on CPU tensors."""
