"""Contrastive pre-training: images and texts in one space."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "data": ["CaptionTexts", "Captions", "cropped", "same", "shifted"],
    "dual_encoder": ["DualEncoder"],
    "losses": [
      "clip_gathered_loss",
      "clip_loss",
      "siglip_loss",
      "siglip_ring_loss",
    ],
    "objective": ["Contrastive", "sigmoid", "softmax"],
    "zero_shot": ["Classifier", "ZeroShot", "ZeroShotReport"],
  },
)
