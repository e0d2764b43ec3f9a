"""Kronecker-factored blocks, shared by FishLeg and K-FAC."""
