"""Chapter 4's model, trained and evaluated faster, with the same results."""
