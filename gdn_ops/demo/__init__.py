"""Show a training-free associative memory over real bytes, run by the op itself."""
