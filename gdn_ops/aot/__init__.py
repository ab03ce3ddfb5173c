"""Compile kernels ahead of time and judge the code."""
