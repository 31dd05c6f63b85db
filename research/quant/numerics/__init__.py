"""Arithmetic of few bits: integers, small floats, codebooks."""
