"""Products with packed weights, on every backend."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "api": ["quantized_matmul"],
  },
)
