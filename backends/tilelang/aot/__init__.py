"""Compile the kernels ahead of time, for a GPU that this machine need not have."""
