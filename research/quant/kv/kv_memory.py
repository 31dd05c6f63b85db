"""What keys and values take in memory: all arrays, and a token's share."""

import dataclasses
from typing import Any

import jax

from research.nn.transformer import Transformer, init_cache
from research.quant.kv.kv_quantizer import KVByLayer, KVQuantizer
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a model's cache takes.

  Attributes:
    bytes_per_token: of a packed token in all layers.
    bits_per_number: of its keys' and values' numbers, scales included.
    cache_bytes: of all arrays: room for whole tokens and rounding up included.
    cache_bits_per_number: of all arrays, for each number they are asked to
      hold.
  """

  bytes_per_token: float
  bits_per_number: float
  cache_bytes: int
  cache_bits_per_number: float


def memory(
  model: Transformer,
  params: Params,
  batch: int,
  capacity: int,
  kv: KVQuantizer | KVByLayer | None = None,
) -> Memory:
  """Returns what a cache takes; nothing is allocated.

  Args:
    model: the Transformer.
    params: its parameters, or their shapes.
    batch: rows.
    capacity: positions of layers without a window.
    kv: how it is packed; None for the model's dtype.
  """
  cache = jax.eval_shape(
    lambda: init_cache(model, params, batch, capacity, kv=kv)
  )
  bits, count, held = 0.0, 0, 0
  for i, block in enumerate(model.layer_kinds()):
    a = block.attention
    width = a.kv_heads * a.head_dim
    own = 8.0 * jax.numpy.dtype(model.dtype).itemsize
    one = None if kv is None else kv.of([i])
    bits += width * sum(_bits(one, a.head_dim, own))
    count += 2 * width
    held += 2 * width * min(capacity, a.window or capacity) * batch
  total = nbytes(cache.layers)
  return Memory(bits / 8, bits / count, total, total * 8 / held)


def _bits(kv: KVQuantizer | None, dim: int, own: float) -> tuple[float, float]:
  """Returns bits of a key's and a value's number; `own` where it is whole."""
  if kv is None:
    return own, own
  k, v = (own if grid.whole else grid.bits_per_number(dim) for grid in kv.grids)
  return k, v


def nbytes(cache: Any) -> int:
  """Returns the bytes of a cache's arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
