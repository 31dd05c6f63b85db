"""Memory of a quantized KV cache: all arrays, and per token."""

import dataclasses
from typing import Any

import jax

from research.nn.transformer import Transformer, init_cache
from research.quant.kv.kv_quantizer import KVByLayer, KVQuantizer
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory of a model's KV cache.

  Attributes:
    bytes_per_token: bytes of a packed token in all layers.
    bits_per_number: bits per number of keys and values, scales included.
    cache_bytes: bytes of all arrays, including unquantized tokens and padding.
    cache_bits_per_number: `cache_bytes` in bits, per number of the requested
      capacity.
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
  """Returns the memory of a cache, without allocating it.

  Args:
    params: its parameters, or their shapes.
    kv: the quantizer; None for the model's dtype.
  """
  cache = jax.eval_shape(
    lambda: init_cache(model, params, batch, capacity, kv=kv)
  )
  bits, count, held = 0.0, 0, 0
  for i, block in enumerate(model.layer_kinds()):
    a = block.attention
    if a.kv == "borrowed":  # of a layer that counts
      continue
    width = a.kv_heads * a.head_dim
    own = 8.0 * jax.numpy.dtype(model.dtype).itemsize
    one = None if kv is None else kv.for_layers([i])
    bits += width * sum(_bits(one, a.head_dim, own))
    count += 2 * width
    held += 2 * width * min(capacity, a.window or capacity) * batch
  total = nbytes(cache.layers)
  return Memory(bits / 8, bits / count, total, total * 8 / held)


def _bits(kv: KVQuantizer | None, dim: int, own: float) -> tuple[float, float]:
  """Returns bits per number of keys and of values; `own` if unquantized."""
  if kv is None:
    return own, own
  k, v = (
    own if grid.unquantized else grid.bits_per_number(dim) for grid in kv.grids
  )
  return k, v


def nbytes(cache: Any) -> int:
  """Returns the bytes of a cache's arrays, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
