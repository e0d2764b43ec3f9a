"""One-shot pruning of one network: `python -m experiments.one_shot`."""
