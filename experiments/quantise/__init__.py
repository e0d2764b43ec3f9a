"""Pruning and quantisation together, as one QUBO of the Fisher."""
