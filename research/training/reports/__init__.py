"""What a run says of itself: metrics, goodput, plots."""
