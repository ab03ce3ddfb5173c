"""Plan, compile and launch the kernels."""
