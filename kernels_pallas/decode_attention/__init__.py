"""Attention of new tokens to a cache, contiguous or in pages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "api": ["decode_attention", "paged_attention"],
  },
)
