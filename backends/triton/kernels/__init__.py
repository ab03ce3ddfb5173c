"""The kernels; the numbers above their blocks are those of the mathematics chapter."""
