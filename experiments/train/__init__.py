"""Training from scratch, optimisers compared: `python -m experiments.train`."""
