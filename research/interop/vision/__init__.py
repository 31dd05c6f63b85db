"""Vision models in Hugging Face's format: configuration, names, reading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "config": ["vision_language_model"],
    "contrastive": ["contrastive_params", "dual_encoder"],
    "families.table": ["family_of"],
    "image_size": ["ImageSize"],
    "qformer": [
      "image_text_model",
      "image_text_params",
      "image_text_tensors",
      "qformer_from_config",
      "qformer_params",
      "qformer_tensors",
    ],
    "read": ["load", "model_from_directory", "vision_language_params"],
    "source": ["Assembled", "Interleaved", "encoder_params"],
    "write": ["vision_language_tensors", "write_model"],
  },
)
