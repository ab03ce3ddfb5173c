"""Define the kernels of the Triton backend; §n in a comment is a section of docs/math.md."""
