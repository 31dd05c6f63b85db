"""Matmul with packed weights for GPUs, in Pallas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mosaic_gpu": ["input_gradient", "product"],
    "support": ["is_for", "unsupported"],
    "tile_sizes": ["Tile"],
  },
)
