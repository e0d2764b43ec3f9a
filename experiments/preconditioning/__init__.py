"""Preconditioners of the group update: `python -m experiments.preconditioning`."""
