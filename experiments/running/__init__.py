"""Shared by all experiments: arguments, results, files, memory and processes."""
