"""Merging adapters into weights, and with each other."""
