"""Inverses of a damped sum of outer products, shared by WoodFisher and M-FAC."""
