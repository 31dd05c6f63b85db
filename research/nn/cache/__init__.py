"""Keys and values of what was read."""

from research.nn.cache.kv_cache import (
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
