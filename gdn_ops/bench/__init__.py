"""Benchmarks over the named cases: comparators in one process, interleaved, checked first."""
