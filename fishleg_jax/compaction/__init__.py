"""Physically smaller networks out of pruned ones."""
