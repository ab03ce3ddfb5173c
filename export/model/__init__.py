"""Read, make and change models that hold our nodes."""
