"""Dequantization of packed weights in TPU vector registers; see `planar`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul.planar import LANES, PLANES, WORDS

# bfloat16 has 7 fraction bits: with the code in the upper four of them and the
# exponent of 16, the number is exactly 16 + code.
_SIXTEEN = 0x41804180
_CODE = 0x00780078
_LIFT = 3

ROWS = 8
"""Sublanes per register."""


def base(codebook: tuple[float, ...]) -> float:
  """Returns what must be added to `levels` to get the codebook's entries."""
  return codebook[0] - 16 if _is_arithmetic(codebook) else 0.0


def _is_arithmetic(codebook: tuple[float, ...]) -> bool:
  """Whether the entries of a codebook are consecutive integers."""
  if not codebook:
    return False
  first = codebook[0]
  return all(x == first + i for i, x in enumerate(codebook)) and (
    first == int(first)
  )


def levels(
  codes: jax.Array,
  codebook: tuple[float, ...],
  dtype: Any,
  found: Sequence[jax.Array],
) -> jax.Array:
  """Converts codes of whole blocks to numbers, up to `base`.

  Args:
    codes: uint32 [N / 8, lanes] or int8 [N, lanes], N a multiple of 128.
    codebook: of 4-bit codes; else empty.
    dtype: bfloat16 (to which entries are rounded) or float32.
    found: `tables` of the same codebook and dtype.

  Returns:
    [N, lanes]: 8-bit codes, 16 + code, or the codebook's entries.
  """
  if codes.dtype == jnp.int8:
    return codes.astype(dtype)
  planes = []
  for n in range(0, codes.shape[0], WORDS):
    words = codes[n : n + WORDS]
    for j in range(PLANES):
      if found:
        planes.append(_looked_up(words, j, found, dtype))
      else:
        planes.append(_sixteen_more(words, j).astype(dtype))
  return jnp.concatenate(planes, axis=0)


def _right(x: jax.Array, n: int) -> jax.Array:
  """Shifts `x` right by n bits, left if n is negative."""
  return x >> jnp.uint32(n) if n >= 0 else x << jnp.uint32(-n)


def _sixteen_more(words: jax.Array, j: int) -> jax.Array:
  """Returns 16 + code of plane j, in three register operations."""
  moved = _right(words, 4 * j - _LIFT)
  bits = (moved & jnp.uint32(_CODE)) | jnp.uint32(_SIXTEEN)
  return pltpu.bitcast(bits, jnp.bfloat16)


def tables(codebook: tuple[float, ...], dtype: Any) -> tuple[jax.Array, ...]:
  """Returns lookup tables of the entries, uint32 [8, 128]; empty if not needed.

  A lookup selects one of a register's 8 rows, separately in each lane. For
  bfloat16 a row holds two entries, n and n + 8, and in the second table n + 8
  and n; for float32 the tables are the first and the second half of the
  entries.
  """
  if not codebook or _is_arithmetic(codebook):
    return ()
  row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
  halves = [np.asarray(codebook[n : n + ROWS], np.float32) for n in (0, ROWS)]
  if dtype == jnp.float32:
    filled = [half.view(np.uint32) for half in halves]
  else:
    first, second = (
      half.astype(dtype).view(np.uint16).astype(np.uint32) for half in halves
    )
    filled = [first | second << 16, second | first << 16]

  def table(entries):
    found = jnp.zeros((ROWS, LANES), jnp.uint32)
    for n, entry in enumerate(entries):
      found = jnp.where(row == n, jnp.uint32(entry), found)
    return found

  return tuple(map(table, filled))


def _looked_up(words: jax.Array, j: int, found, dtype) -> jax.Array:
  """Looks up the entries of plane j, register by register."""
  look = _of_float32 if dtype == jnp.float32 else _of_bfloat16
  rows = [
    jnp.concatenate(
      [
        look(words[n : n + ROWS, o : o + LANES], j, found)
        for o in range(0, words.shape[1], LANES)
      ],
      axis=1,
    )
    for n in range(0, WORDS, ROWS)
  ]
  return jnp.concatenate(rows, axis=0)


def _of_bfloat16(words, j, found):
  """Two lookups, for a low and a high half; bit 3 selects an entry of a row."""
  first, second = found
  sixteen = jnp.uint32(16)
  low = _pick(first, words, 4 * j) >> (_right(words, 4 * j - 1) & sixteen)
  high = _pick(second, words, 4 * j + 16) << (
    _right(words, 4 * j + 15) & sixteen
  )
  lower = jnp.uint32(0xFFFF)
  return pltpu.bitcast((low & lower) | (high & ~lower), jnp.bfloat16)


def _of_float32(words, j, found):
  first, second = found

  def entries(n):
    late = (words & jnp.uint32(8 << n)) != 0
    return jnp.where(late, _pick(second, words, n), _pick(first, words, n))

  low, high = entries(4 * j), entries(4 * j + 16)
  half, lower = jnp.uint32(16), jnp.uint32(0xFFFF)
  # Both halves of the bits in row order, then combined.
  top = (low >> half) | (high & ~lower)
  rest = (low & lower) | (high << half)
  top, rest = (
    pltpu.bitcast(x, jnp.uint16).astype(jnp.uint32) for x in (top, rest)
  )
  return jax.lax.bitcast_convert_type((top << half) | rest, jnp.float32)


def _pick(table: jax.Array, words: jax.Array, n: int) -> jax.Array:
  """Selects rows of a table by bits n to n + 2, in each lane.

  `jnp.take_along_axis` would also handle negative indices, at twice the cost.
  """
  index = (_right(words, n) & jnp.uint32(7)).astype(jnp.int32)
  along = jax.lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=(0,),
    start_index_map=(0,),
    operand_batching_dims=(1,),
    start_indices_batching_dims=(1,),
  )
  return jax.lax.gather(
    table, index[..., None], along, (1, 1), mode="promise_in_bounds"
  )


def scaled(
  found: jax.Array,
  scale: jax.Array,
  offset: jax.Array | None,
  group: int,
  shift: float,
) -> jax.Array:
  """Scales levels to weights, in float32.

  Args:
    found: float32 [N, lanes].
    scale: float32 [N / group, lanes], or [1, lanes] for one scale.
    offset: the same shape, or None.
    group: rows per scale.
    shift: from `base`.
  """
  rows, lanes = found.shape
  group = min(group, rows)
  add = None if offset is None else offset
  if shift:
    add = scale * shift if add is None else add + scale * shift
  apart = found.reshape(rows // group, group, lanes) * scale[:, None]
  if add is not None:
    apart = apart + add[:, None]
  return apart.reshape(rows, lanes)
