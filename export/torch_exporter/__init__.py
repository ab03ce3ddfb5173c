"""Export torch modules to models with our nodes."""
