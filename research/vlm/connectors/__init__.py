"""Connectors: from an encoder's features to soft tokens of a language model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "deep_stack": ["DeepStack"],
    "group_attention": ["GroupAttention"],
    "presets": ["CONNECTORS"],
    "projections": [
      "AveragePool",
      "Linear",
      "Mlp",
      "ScaledNormal",
      "Squares",
      "Standardise",
    ],
    "qformer": ["QFormer"],
    "resamplers": ["AttentionPool", "PerceiverResampler"],
    "square_attention": ["SquareAttention"],
  },
)
