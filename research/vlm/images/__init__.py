"""Images on their way to an encoder, in numpy and Pillow; nothing imports JAX.

`decode` reads files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "decode": ["image_size", "open_image"],
  },
)
