"""Encoders: image towers, and the text towers of contrastive models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "gemma4": ["Gemma4Heads", "gemma4_vision"],
    "grouped": ["GroupedViews"],
    "native": ["Patches"],
    "presets": [
      "EncoderSizes",
      "clip",
      "clip_text",
      "naflex",
      "rice",
      "siglip",
      "siglip_text",
    ],
    "resize_positions": ["bicubic", "corner_aligned", "resized_positions"],
    "text": ["TextEncoder"],
    "vit": ["Features", "VisionTransformer"],
    "windows": ["WindowedBlock"],
  },
)
