"""Matmul with packed weights for TPUs, in Pallas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mosaic_tpu": ["input_gradient", "product"],
    "support": ["unsupported"],
    "tile_sizes": ["Config", "Tile"],
  },
)
