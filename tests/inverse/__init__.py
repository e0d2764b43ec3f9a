"""Tests, file by file as in `fishleg_jax/`."""
