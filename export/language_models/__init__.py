"""Export whole language models: read their weights, write their graphs, describe their folders."""
