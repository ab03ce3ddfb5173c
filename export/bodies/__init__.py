"""Write the function bodies of our nodes."""
