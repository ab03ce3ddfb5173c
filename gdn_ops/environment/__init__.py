"""Describe this machine: versions, devices, sources, certificates."""
