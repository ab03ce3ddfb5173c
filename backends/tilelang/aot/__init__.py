"""Compile the kernels for a GPU that is not there."""
