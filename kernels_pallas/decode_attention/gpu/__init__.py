"""Decoding attention for GPUs, in Pallas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mosaic_gpu": ["mosaic_gpu_decode"],
    "support": ["KEYS", "splits_for", "unsupported"],
  },
)
