"""What `quantize` is configured by, and what `evaluate --base=` reports."""
