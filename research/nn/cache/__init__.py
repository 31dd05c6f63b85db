"""Key/value caches."""

from research.nn.cache.kv_cache import (
  Cache,
  LayerCache,
  SlotCache,
  slot_positions,
  take_rows,
  write,
)

__all__ = [
  "Cache",
  "LayerCache",
  "SlotCache",
  "slot_positions",
  "take_rows",
  "write",
]
