"""The Transformer, and the layers it is made of."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "attention": ["Attention", "CrossAttention"],
    "block": ["Block"],
    "mlp": ["Mlp", "PlainMlp"],
    "norm": ["LayerNorm", "RMSNorm"],
    "presets": ["FAMILIES", "Sizes"],
    "rope": ["Rope"],
    "stack": ["Stack"],
    "time_embedding": ["AdaLN", "TimeEmbedding", "TimestepEmbedder"],
    "transformer": ["Transformer", "init_cache", "logits"],
  },
)
