"""Filling masks: denoisers, caches, policies, and the loop."""
