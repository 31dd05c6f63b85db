"""What a step would need and take on devices that are not here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "chips": ["topology"],
    "forecast": ["Forecast"],
  },
)
