"""FlashAttention for GPUs, in Pallas: Ampere, Hopper, Blackwell."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mosaic_gpu": [
      "mosaic_gpu_attention",
      "mosaic_gpu_gradients",
      "rounded_gradients",
    ],
    "support": [
      "cores",
      "no_kernel_reason",
      "num_multiprocessors",
      "unsupported",
    ],
  },
)
