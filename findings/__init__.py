"""Surprises about other people's software, as programs that show them; see README.md."""
