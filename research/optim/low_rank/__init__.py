"""Optimizers with low-rank state: GaLore and its kin."""
