"""Preferences and rewards for masked diffusion."""
