"""Layers of a language model that attend to images, and what they attend to."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "gated": ["GatedCrossAttention"],
    "media": ["Media"],
  },
)
