"""Attention over a sequence that devices share: ring, Ulysses, gather."""
