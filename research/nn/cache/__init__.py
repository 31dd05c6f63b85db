"""Key/value caches."""

from research.nn.cache.kv_cache import (
  Cache,
  LayerCache,
  SlotCache,
  put_rows,
  slot_positions,
  take_rows,
  write,
)

__all__ = [
  "Cache",
  "LayerCache",
  "SlotCache",
  "put_rows",
  "slot_positions",
  "take_rows",
  "write",
]
