"""A cache of single tokens as pages, for the kernels that read those.

`int8` and `fp8` without recent or first tokens apart are the numbers and scales
of `decode_attention.pages`, token by token: only their places differ.
"""

import jax.numpy as jnp

from kernels_pallas.decode_attention.pages import Pages
from research.quant.kv_cache import QuantizedLayer
from research.quant.kv_grid import SYMMETRIC
from research.typing import Array, Int, UserError


def pages(layer: QuantizedLayer, size: int) -> tuple[Pages, Int[Array, "R W"]]:
  """Returns a layer's keys and values as pages, and each row's table.

  Args:
    layer: of one layer, `[B, K, ...]`.
    size: tokens a page; divides the layer's slots.

  Raises:
    UserError: the layer keeps its tokens in another way.
  """
  k, v = layer.k, layer.v
  plain = all(
    side.grid.bits == k.grid.bits in SYMMETRIC
    and not side.grid.per_channel
    and not side.grid.rotated
    and side.recent is None
    for side in (k, v)
  )
  if not plain or layer.sinks is not None or layer.shifted:
    raise UserError(
      "pages: found keys and values that no page holds, expected int8 or fp8 "
      "of both, per token, without residual, sink_tokens and less_bias"
    )
  if layer.slots % size:
    raise UserError(
      f"pages: found {layer.slots} slots, expected a multiple of {size}"
    )
  rows, heads, slots, dim = k.packed.codes.shape
  count = slots // size

  def paged(x):
    return x.reshape(rows, heads, count, size, -1).swapaxes(1, 2)

  both = jnp.concatenate([k.packed.codes, v.packed.codes], axis=-1)
  kv = paged(both).reshape(rows * count, heads, size, -1)
  scale = jnp.stack(
    [paged(side.packed.scale)[..., 0] for side in (k, v)], axis=2
  )
  scale = scale.reshape(rows * count, 2, heads, size)
  table = jnp.arange(rows * count, dtype=jnp.int32).reshape(rows, count)
  return Pages(kv, scale, dim), table
