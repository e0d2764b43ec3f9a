"""All methods at their defaults on networks of many kinds: `python -m experiments.arena`."""
