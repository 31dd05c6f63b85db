"""BLIP-2's first stage: a Q-Former learns which images texts describe."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "masks": ["bidirectional", "multimodal_causal", "unimodal"],
    "model": ["CaptionHead", "ImageTextModel"],
    "objective": ["FromPixels", "ImageText"],
  },
)
