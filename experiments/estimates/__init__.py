"""The table of methods, fits of their estimates, and the search for dampings."""
