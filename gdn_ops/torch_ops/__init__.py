"""Register the ops with PyTorch, and trace them."""
