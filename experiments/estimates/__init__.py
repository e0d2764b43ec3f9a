"""The table of methods, and fits of their estimates of the inverse Fisher."""
