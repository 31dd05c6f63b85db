"""Autoregressive decoding: sampling, streaming, pages, perplexity."""
