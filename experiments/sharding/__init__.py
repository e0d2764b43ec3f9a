"""Pruning over eight virtual devices: `python -m experiments.sharding`."""
