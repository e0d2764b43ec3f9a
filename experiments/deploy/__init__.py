"""What pruning pays in bytes and milliseconds: `python -m experiments.deploy`."""
