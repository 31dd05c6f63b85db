"""Published vision language models as rows: shapes, masks and images.

`published` says what a row is, `rows` has them, `reduced` makes small ones for
tests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "published": ["CrossLayers", "Preset"],
    "rows": ["PRESETS", "preset", "wrapper_tokens"],
  },
)
