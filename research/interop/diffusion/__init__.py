"""Diffusion models of other programs."""
