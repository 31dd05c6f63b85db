"""Decoding attention for TPUs, in Pallas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "append": ["group_size", "mosaic_tpu_append"],
    "mosaic_tpu": ["check_for_tpu", "mosaic_tpu_decode"],
  },
)
