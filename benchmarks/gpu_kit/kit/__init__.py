"""Run stages on a GPU machine: what the archive of `make gpu-kit` holds beside the tree."""
