"""Film reviews with labels, IMDb's and short ones of our own; encoders for them; texts for next tokens."""
