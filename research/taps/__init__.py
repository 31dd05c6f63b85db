"""Statistics of activations and gradients at every weight (taps)."""

from research.taps.taps import (
  Statistics,
  Tap,
  by_address,
  collect,
)

__all__ = [
  "Statistics",
  "Tap",
  "by_address",
  "collect",
]
