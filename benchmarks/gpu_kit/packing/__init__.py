"""Pack the archive for a GPU machine: the tree, packages that it lacks, compiled kernels."""
