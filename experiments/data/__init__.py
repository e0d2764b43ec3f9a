"""Data sets, and the order in which training sees their examples."""
