"""Write the function bodies of our nodes, and list them."""
