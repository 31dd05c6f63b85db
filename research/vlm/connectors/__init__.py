"""Connectors: from an encoder's features to soft tokens of a language model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "projections": ["AveragePool", "Linear", "Mlp", "Squares"],
    "resamplers": ["AttentionPool", "PerceiverResampler"],
  },
)
