"""Reading activations on their way."""

from research.taps.taps import (
  Found,
  Tap,
  by_address,
  collect,
)

__all__ = [
  "Found",
  "Tap",
  "by_address",
  "collect",
]
