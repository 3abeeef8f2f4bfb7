"""Film reviews with labels: IMDb's and short ones of our own. Also texts for next-token training."""
