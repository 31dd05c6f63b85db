"""Images on their way to an encoder, in numpy and Pillow; nothing imports JAX.

`decode` reads files, `tiling/` has a file for each way of making views, `plan`
counts views and soft tokens from an image's size alone, `prompts` says what
stands for an image in a text, `prompt_ids` makes ids of both, `presets` has
published models' preprocessing, and `configs` reads their
`preprocessor_config.json`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "configs": ["from_preprocessor_config"],
    "decode": ["image_size", "open_image"],
    "normalise": ["Normalisation"],
    "patches": ["patchify"],
    "plan": ["Plan", "Tiling", "Views"],
    "preprocessor": ["Preprocessor", "describe"],
    "presets": ["PRESETS", "preset"],
    "prompts": ["text_of", "token_count"],
  },
)
