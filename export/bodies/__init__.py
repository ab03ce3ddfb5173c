"""Write the function bodies of our nodes: a file per body, and the table of them."""
