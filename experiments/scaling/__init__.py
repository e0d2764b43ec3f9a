"""Costs of large networks from shapes alone: `python -m experiments.scaling`."""
