"""Film reviews with labels (the Large Movie Review Dataset, short ones of our own), texts for next-token training."""
