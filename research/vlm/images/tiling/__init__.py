"""How an image becomes views: a file a kind.

A kind is a `Tiling`: `plan(height, width)` counts views and soft tokens,
`views(image)` makes the views. There is no registry; presets and configurations
name classes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "anyres": ["AnyRes"],
    "budget": ["Budget"],
    "centre_crop": ["CentreCrop"],
    "idefics3": ["Idefics3"],
    "internvl": ["InternVL"],
    "naflex": ["NaFlex"],
    "nanovlm": ["NanoVLM"],
    "native": ["Native"],
    "overlap": ["Overlap"],
    "pad_to_square": ["PadToSquare"],
    "pan_and_scan": ["PanAndScan"],
    "square": ["Square"],
  },
)
