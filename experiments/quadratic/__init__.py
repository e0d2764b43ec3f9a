"""Quadratic models of the loss, and dampings: `python -m experiments.quadratic`."""
