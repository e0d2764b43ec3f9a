"""Accuracy against memory cells: by curvature, equal, and digital."""
