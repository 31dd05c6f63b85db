"""Training objectives (losses)."""
