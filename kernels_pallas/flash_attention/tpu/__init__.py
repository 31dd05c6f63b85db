"""FlashAttention for TPUs, in Pallas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mosaic_tpu": ["mosaic_tpu_attention", "mosaic_tpu_gradients"],
  },
)
