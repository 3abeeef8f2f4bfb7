"""Film reviews: the Large Movie Review Dataset with its labels, and texts for next-token training."""
