"""A quantized cache of single tokens, converted to the kernels' pages.

Two implementations that must agree byte for byte: `int8` and `fp8` of
`KVQuantizer`, token by token, and `decode_attention` appending to 8-bit pages.
Only the layouts differ.
"""

import jax.numpy as jnp

from kernels_pallas.decode_attention.pages import Pages
from research.quant.kv.kv_cache import QuantizedLayer
from research.typing import Array, Int


def pages(layer: QuantizedLayer, size: int) -> tuple[Pages, Int[Array, "R W"]]:
  """Returns a layer's keys and values as pages, and each row's table.

  Args:
    layer: `[B, K, ...]`, int8 or fp8 per token, without residual, sinks and
      shifted keys.
    size: Tokens per page; divides the layer's slots.
  """
  k, v = layer.k, layer.v
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
