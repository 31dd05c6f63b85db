"""What commands share: an experiment, its configuration, its outputs."""
