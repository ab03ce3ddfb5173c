"""Find the backends, and choose the one that runs a call."""
