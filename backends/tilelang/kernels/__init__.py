"""Define the kernels of the TileLang backend: factories `make(T, **constants)` of prim_funcs."""
