"""Vision models in Hugging Face's format: configuration, names, reading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "config": ["vision_language_model"],
    "contrastive": [
      "contrastive_config",
      "contrastive_params",
      "contrastive_tensors",
      "dual_encoder",
    ],
    "families.table": ["family_of"],
    "image_size": ["ImageSize"],
    "read": ["load", "model_from_directory", "vision_language_params"],
    "source": ["Assembled", "Interleaved", "encoder_params"],
    "write": ["vision_language_tensors", "write_model"],
  },
)
