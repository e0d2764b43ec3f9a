"""Who loses by pruning: predictions that change, and how strongly their examples are memorised."""
