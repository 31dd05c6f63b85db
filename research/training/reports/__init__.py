"""Reports of a run: metrics, goodput, plots."""
