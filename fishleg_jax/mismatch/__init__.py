"""Comparison of two networks prediction by prediction, and estimates of memorisation."""
