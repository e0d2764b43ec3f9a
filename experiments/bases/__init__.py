"""Pruning in the coefficients of a discrete cosine transform beside pruning in space."""
