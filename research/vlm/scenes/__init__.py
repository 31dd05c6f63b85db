"""Images whose answers are known, one kind of scene a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "blind_test": ["BlindTest"],
    "captions": ["ShapeCaptions"],
    "digits": ["DigitNames", "Digits"],
    "grounding": ["Grounding"],
    "mixed": ["Mixed"],
    "multi_image": ["MultiImage"],
    "pope": ["PopeShapes"],
    "rules": ["BestGiven", "PerSample", "MAJORITY", "Rule"],
    "sample": ["Object", "Sample"],
    "shapes": ["Shapes"],
    "sheet": ["contact_sheet"],
    "stamps": ["Stamp", "Stamps", "read_stamps"],
    "task": ["Task", "split_of"],
    "text": ["Text"],
    "tiles": ["SpotTiles"],
  },
)
