"""Encoders: image towers, and the text towers of contrastive models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "presets": [
      "EncoderSizes",
      "clip",
      "clip_text",
      "rice",
      "siglip",
      "siglip_text",
    ],
    "text": ["TextEncoder"],
    "vit": ["Features", "VisionTransformer"],
  },
)
