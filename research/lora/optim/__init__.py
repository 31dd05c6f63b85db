"""Optimizers that know which factors belong together."""
