"""Benchmark the named cases: comparators are checked first, then timed in turns."""
