"""What the notebooks draw and tell."""
