"""Studies of masked diffusion."""
