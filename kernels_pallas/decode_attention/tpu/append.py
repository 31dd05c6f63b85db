"""Appending tokens to KV pages on a TPU, in place.

A register holds several tokens of a head (8 of float32, 32 of int8), so a
single token cannot be written: the group of tokens that share registers is
read, merged and written back. XLA's scatter would first transpose the pages to
make it possible, which copies all quantized pages twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Shaped

from kernels_pallas.decode_attention.ragged import RaggedRows


def group_size(dtype: Any) -> int:
  """Returns the number of tokens of a head that share registers."""
  return 32 // jnp.dtype(dtype).itemsize


def mosaic_tpu_append(
  storage: Shaped[Array, "pages K size W"],
  new: Shaped[Array, "T K W"],
  rows: RaggedRows,
  interpret: Any,
) -> Shaped[Array, "pages K size W"]:
  """Appends the tokens of `rows` to their sequences in `storage`.

  Args:
    storage: Pages, whose size is a whole number of groups.
    new: Tokens, in the dtype of the pages.
    rows: The rows that the tokens belong to; table entries are clamped.
    interpret: None or False to compile, or as in `pl.pallas_call`.
  """
  (_, K, size, W), g = storage.shape, group_size(storage.dtype)
  items, tokens = _items(rows, new.shape[0], g, size, storage.shape[0])
  fresh = new[jnp.clip(tokens, 0, new.shape[0] - 1)].swapaxes(1, 2)

  def place(i, items):
    page, group = (items[n * len(tokens) + i] for n in (0, 1))
    return page, 0, group, 0

  spec = pl.BlockSpec((None, K, g, W), place)
  return pl.pallas_call(
    functools.partial(_kernel, len(tokens)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(len(tokens),),
      in_specs=[
        pl.BlockSpec((None, K, g, W), lambda i, *_: (i, 0, 0, 0)),
        spec,
      ],
      out_specs=spec,
    ),
    out_shape=jax.eval_shape(jnp.zeros_like, storage),
    input_output_aliases={2: 0},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    cost_estimate=pl.CostEstimate(
      flops=0,
      transcendentals=0,
      bytes_accessed=3 * fresh.size * storage.dtype.itemsize,
    ),
    interpret=interpret or False,
    name="append_to_pages",
  )(items, fresh, storage)


def _kernel(count, items, new, old, out):
  i = pl.program_id(0)
  low, high = items[2 * count + i], items[3 * count + i]

  # Unused items repeat the last one's block, which is not written back before
  # they are done; the first item has no predecessor.
  @pl.when((low < high) | (i == 0))
  def _():
    wide = jnp.int32 if old.dtype == jnp.int8 else jnp.float32
    slot = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    fresh = (slot >= low) & (slot < high)
    merged = jnp.where(fresh, new[...].astype(wide), old[...].astype(wide))
    out[...] = merged.astype(out.dtype)


def _items(x: RaggedRows, T, g, size, pages):
  """Returns the groups to write as (page, group, first and last slot), flat,
  and the tokens of their slots [items, g]."""
  R = x.kv_lens.shape[0]
  room = x.table.shape[1] * size
  new = x.starts[1:] - x.starts[:-1]
  first = jnp.maximum(x.kv_lens - new, 0)
  last = jnp.clip(x.kv_lens, 0, room)
  count = jnp.where(last > first, (last + g - 1) // g - first // g, 0)
  ends = jnp.cumsum(count)
  # A row starts and ends within a group; every group has a token.
  items = min(T, (T + 2 * R * (g - 1)) // g)
  item = jnp.arange(items, dtype=jnp.int32)
  here = jnp.minimum(item, jnp.maximum(ends[-1] - 1, 0))
  row = jnp.minimum(jnp.searchsorted(ends, here, side="right"), R - 1)
  group = first[row] // g + here - (ends[row] - count[row])
  group = jnp.clip(group, 0, room // g - 1)
  each = np.int32(size // g)
  page = jnp.clip(x.table[row, group // each], 0, pages - 1)
  low = jnp.clip(first[row] - group * g, 0, g)
  high = jnp.clip(last[row] - group * g, 0, g)
  high = jnp.where(item < ends[-1], high, low)
  slot = group[:, None] * g + jnp.arange(g)
  # Of more new tokens than a row has, those of position 0 and later are stored.
  before = x.kv_lens - new
  tokens = x.starts[row][:, None] + slot - before[row][:, None]
  fields = jnp.stack([page, group % each, low, high]).astype(jnp.int32)
  return fields.reshape(-1), tokens
