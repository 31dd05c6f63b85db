"""Gemma 4's language models: sizes, and what its layers get of each token."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "per_layer": ["PerLayerInputs", "PerLayerUpdate"],
    "sizes": ["Gemma4Sizes", "gemma4"],
  },
)
