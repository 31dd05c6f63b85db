"""Caches of few bits."""
