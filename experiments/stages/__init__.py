"""Runs of several stages, each from the result of the one before it."""
