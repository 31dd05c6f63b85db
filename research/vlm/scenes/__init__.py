"""Images whose answers are known, one kind of scene a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "rules": ["BestGiven", "Each", "MAJORITY", "Rule"],
    "sample": ["Object", "Sample"],
    "shapes": ["Shapes"],
    "task": ["Task", "split_of"],
  },
)
