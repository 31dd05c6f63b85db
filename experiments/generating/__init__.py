"""What `generate` is made of, and how `perplexity` reads a text.

Masks that are filled, adapters a row, pages.
"""
