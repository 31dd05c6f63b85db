"""What a Transformer knows of images among its tokens: positions, features."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "features": ["InjectedFeatures", "at_placeholders"],
    "positions": ["ImagePositions", "rope_index", "with_axes"],
  },
)
