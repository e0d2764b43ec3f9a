"""Timings, each a script of its own."""
