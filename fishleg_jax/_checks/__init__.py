"""Argument checks shared by several packages: numbers and arrays."""
