"""Measure backends and peers on one GPU, unattended, within a time limit."""
