"""Low-rank decompositions in the metric of the Fisher beside plain ones."""
