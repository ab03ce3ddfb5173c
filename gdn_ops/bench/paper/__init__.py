"""Measure what the paper on Gated DeltaNet (arXiv 2412.06464) claims: speed, memory, latency."""
