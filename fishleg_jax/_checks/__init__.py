"""Refusals that several rooms share: numbers, arrays, models."""
