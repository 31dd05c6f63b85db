"""Keys and values of what was read."""

from research.nn.cache.cache import (
  Cache,
  LayerCache,
  Slots,
  slot_positions,
  write,
)

__all__ = [
  "Cache",
  "LayerCache",
  "Slots",
  "slot_positions",
  "write",
]
