"""Gradual pruning during training: `python -m experiments.gradual`."""
