"""Masks: built from scores, extended, counted, stored."""
