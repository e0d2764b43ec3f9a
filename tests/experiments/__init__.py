"""Tests of the experiments: small runs, and what they say to bad input."""
