"""Questions drawn as pictures, and models that read them in prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "drawn": ["DrawnQuestion"],
    "reader": ["ImageReader"],
    "word_grid": ["WordGrid"],
  },
)
