"""Comparison of all methods on the same data: `python -m experiments.compare`."""
