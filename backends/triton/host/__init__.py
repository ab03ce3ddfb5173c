"""Plan and launch the kernels."""
