"""Prompts with images: conversations, and questions drawn as pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "conversations": ["ChatSample", "join_texts"],
    "drawn": ["DrawnQuestion"],
    "reader": ["ImageReader"],
    "word_grid": ["WordGrid"],
  },
)
