"""Describe an op as data: its language, its values, its documentation."""
