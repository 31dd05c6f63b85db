"""Tile operations of the GPU kernels: logits, masks, softmax, dropout.

Values belong to one warpgroup, 64 rows in the layout of `wgmma` or 128 in one
of tensor memory (`layout`). Rows are queries in the kernels that stream keys,
and keys in the one that streams queries; `along` is the axis of the queries.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu.problem import KEYS, Problem
from kernels_pallas.flash_attention.gpu.tile_sizes import ROWS

LOG2E = math.log2(math.e)
LN2 = math.log(2)

WIDE_HEAD_DIM = 128
"""Head dim above which accumulators take half of the registers."""


class TileContext(NamedTuple):
  """A warpgroup's context.

  Fields: p, the problem; refs, its arrays by name; operand, shared memory for
  the left operand of `accumulate`, or None if that comes from registers; b, the
  batch row; h, the query head.
  """

  p: Problem
  refs: dict[str, Any]
  operand: Any
  b: Any
  h: Any

  @property
  def along(self) -> int:
    """The axis of the queries."""
    return 0 if self.p.streamed == KEYS else 1


class Logits(NamedTuple):
  """Fields: t, base-2 logits up to a factor; factor; slope of the soft cap, or
  None."""

  t: jax.Array
  factor: float
  slope: jax.Array | None


def shape(p: Problem) -> tuple[int, int]:
  """Returns rows and columns of a warpgroup's scores."""
  return p.tile.height, p.tile.streamed


def layout(p: Problem) -> Any:
  """Returns the register layout of a warpgroup's scores.

  With 'tcgen05' a thread may hold a whole row, which sums without shuffles, but
  then values per column (mask arrays, or dropout's hash) need a register each:
  with these, four threads share a row, as with 'wgmma'.
  """
  if p.spec.blocks.cores != "tcgen05":
    return plgpu.Layout.WGMMA
  if p.streamed == KEYS and not (p.columns or p.spec.dropout_rate):
    return plgpu.Layout.TCGEN05_TMEM_NATIVE
  return plgpu.Layout.TCGEN05


def zeros(*size: int) -> jax.Array:
  """Returns a zero accumulator in the layout of `wgmma`."""
  return plgpu.layout_cast(
    jnp.zeros(size, jnp.float32), plgpu.Layout.WGMMA
  )  # fmt: skip


def vector(
  value: Any, rows: int = ROWS, kind: Any = plgpu.Layout.WGMMA
) -> jax.Array:
  """Returns a vector with `value` for each row.

  Args:
    value: A number.
    rows: Number of rows.
    kind: Layout of the matrix, as `layout` returns it.
  """
  return plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), kind.reduce(1)
  )  # fmt: skip


def broadcast_vector(
  x: jax.Array, like: tuple[int, ...], axis: int
) -> jax.Array:
  """Broadcasts a vector along `axis` to shape `like`."""
  return lax.broadcast_in_dim(x, like, [axis])


def logits(p: Problem, s: jax.Array, seen: jax.Array | None) -> Logits:
  """Returns the logits of scores q.k, -inf where masked.

  Args:
    p: The problem.
    s: Products of queries and keys.
    seen: Which pairs are visible, or None for all.
  """
  spec, slope = p.spec, None
  t, factor = s, spec.scale * LOG2E
  if spec.softcap is not None:
    # Hardware tanh has only 11 bits: too few for logits.
    root = lax.rsqrt(1 + jnp.exp2(s * (2 * spec.scale * LOG2E / spec.softcap)))
    t, factor = 1 - 2 * root * root, spec.softcap * LOG2E
    slope = 1 - t * t
  elif spec.scale <= 0:
    t, factor = s * factor, 1.0
  if seen is not None:
    t = jnp.where(seen, t, -jnp.inf)
  return Logits(t, factor, slope)


def probabilities(
  x: TileContext,
  s: jax.Array,
  lse: jax.Array,
  seen: Callable[[], jax.Array] | None,
  kept: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Recomputes a tile's probabilities, and their weights in dS.

  kernels_pallas/MATH.md 3 has the formulas.

  The weight is all that is kept until the gradient of the probabilities is
  known, one register per element: the probability times the slope of the soft
  cap, both nonnegative, negated where dropout drops it.

  Args:
    x: The context.
    s: Products of queries and keys.
    lse: Base-2 log-sum-exps of the queries, +inf if there is none.
    seen: Returns which pairs are visible; None for all.
    kept: Returns which pairs dropout keeps; None for all, or if the caller
      applies it.

  Returns:
    Probabilities after dropout, and weights, not positive where dropped.
  """
  t, factor, slope = logits(x.p, s, None if seen is None else seen())
  e = jnp.exp2(t * factor - broadcast_vector(lse, t.shape, x.along))
  weight = e if slope is None else e * slope
  if kept is None:
    return e, weight
  keep = kept()
  return apply_dropout(x.p, e, keep), jnp.where(keep, weight, -weight)


def logit_gradients(
  x: TileContext,
  weight: jax.Array,
  dp: jax.Array,
  shift: jax.Array,
  signed: bool = False,
) -> jax.Array:
  """Returns dS of a tile: the gradient of its logits, without the scale.

  Args:
    x: The context.
    weight: As returned by `probabilities`.
    dp: Gradient of the probabilities; after dropout, if weights are signed.
    shift: delta of the queries minus the cotangent of their log-sum-exp.
    signed: Whether a weight's sign encodes dropout.
  """
  shift = broadcast_vector(shift, dp.shape, x.along)
  if not signed:
    return weight * (dp - shift)
  # Where dropped, dS is |weight| (0 - shift), and the weight is negative.
  dp = dp * (1 / (1 - x.p.spec.dropout_rate))
  return weight * jnp.where(weight > 0, dp - shift, shift)


def initial_softmax(x: TileContext) -> tuple[jax.Array, jax.Array]:
  """Returns the initial maximum and sum of exponentials: those of sinks."""
  along = functools.partial(vector, rows=x.p.tile.height, kind=layout(x.p))
  if "sinks" in x.refs:
    return along(x.refs["sinks"][x.h] * LOG2E), along(1.0)
  return along(-jnp.inf), along(0.0)


def scale_rows(acc: jax.Array, alpha: jax.Array) -> jax.Array:
  """Scales each row by its factor."""
  return acc * broadcast_vector(alpha, acc.shape, 0)


def softmax(
  p: Problem,
  s: jax.Array,
  seen: jax.Array | None,
  carry: tuple[Any, ...],
  scale: Callable[[Any, jax.Array], Any] = scale_rows,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
  """One step of the online softmax: (acc, m, l, e), acc without the new tile.

  Args:
    p: The problem.
    s: Products of queries and keys.
    seen: Which pairs are visible, or None for all.
    carry: acc, m (in base 2) and l so far.
    scale: Scales the rows of acc, wherever it is stored.
  """
  acc, m, l = carry
  t, factor, _ = logits(p, s, seen)
  m_new = jnp.maximum(m, t.max(axis=1) * factor)
  # Before any visible key: a finite shift, so that exp gives 0, not NaN.
  shift = m_new if seen is None else jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  e = jnp.exp2(t * factor - broadcast_vector(shift, t.shape, 0))
  acc = scale(acc, alpha)
  return acc, m_new, l * alpha + e.sum(axis=1), e


def normalise(
  acc: Any,
  m: jax.Array,
  l: jax.Array,
  scale: Callable[[Any, jax.Array], Any] = scale_rows,
) -> tuple[Any, jax.Array]:
  """Returns o = acc / l and lse = m + log l, natural; 0 and -inf where l = 0.

  Args:
    acc, m, l: As left by `softmax`.
    scale: Scales the rows of acc, wherever it is stored.
  """
  empty = l == 0
  factor = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, l))
  lse = m * LN2 + jnp.log(jnp.where(empty, 1.0, l))
  return scale(acc, factor), jnp.where(empty, -jnp.inf, lse)


def load_query_mask(
  x: TileContext, start: Any, size: int
) -> dict[str, jax.Array]:
  """Loads the mask's arrays of queries [start, start + size), by name."""
  return _vectors(x, "rows", x.p.rows, start, size, 1 - x.along)


def load_key_mask(
  x: TileContext, start: Any, size: int
) -> dict[str, jax.Array]:
  """Loads the mask's arrays of keys [start, start + size), by name."""
  return _vectors(x, "columns", x.p.columns, start, size, x.along)


def visible(x: TileContext, rows, columns, start: Any) -> jax.Array:
  """Returns which pairs of a tile are visible.

  Args:
    x: The context.
    rows: Result of `load_query_mask`.
    columns: Result of `load_key_mask`.
    start: First key.
  """
  p, size, along = x.p, shape(x.p), x.along
  if "key" in columns:
    key, start = broadcast_vector(columns["key"], size, 1 - along), 0
  else:
    key = plgpu.broadcasted_iota(
      jnp.int32, size, 1 - along, layout=layout(p)
    )  # fmt: skip
  seen = None
  for n in range(sum(name.startswith("hi") for name in p.rows)):
    inside = key < broadcast_vector(rows[f"hi{n}"] - start, size, along)
    if f"lo{n}" in rows:
      inside &= key >= broadcast_vector(rows[f"lo{n}"] - start, size, along)
    elif "key" in columns:
      inside &= key >= 0
    seen = inside if seen is None else seen | inside
  if "segment" in rows:
    ours = broadcast_vector(rows["segment"], size, along)
    seen &= ours == broadcast_vector(columns["segment"], size, 1 - along)
  return seen


def dropout_mask(
  x: TileContext, q: Any, k: Any
) -> Callable[[], jax.Array] | None:
  """Returns a function that computes a tile's dropout mask, or None.

  It is called where the mask is used: kept across a barrier, it would occupy
  registers.

  Args:
    x: The context.
    q: First query.
    k: First key.
  """
  p = x.p
  if not p.spec.dropout_rate:
    return None

  def kept():
    i, j = (
      _indices(p, axis, first)
      for axis, first in ((x.along, q), (1 - x.along, k))
    )
    return p.spec.keep(x.refs["seed"][0], p.spec.dropout_rate, x.b, x.h, i, j)

  return kept


def streamed_query_masks(
  x: TileContext,
  where: Callable[[], tuple[Any, Any]],
  masked: bool,
  columns: dict[str, jax.Array],
  start: Any,
) -> tuple[TileContext, Callable[[], jax.Array] | None, Any]:
  """Prepares the masks of a streamed tile of queries against stationary keys.

  Args:
    x: The context, of a key head.
    where: Returns (query head of the group, tile).
    masked: Whether the tile is only partially visible.
    columns: Result of `load_key_mask`.
    start: First key.

  Returns: The context, with the query head if needed; a function that returns
    which pairs are visible, or None for all; and one that returns which pairs
    dropout keeps, or None for all.
  """
  p, first, seen = x.p, 0, None
  if masked or p.spec.dropout_rate:
    head, i = where()
    first, x = i * p.tile.streamed, x._replace(h=x.h * p.group + head)
  if masked:

    def seen():
      bounds = load_query_mask(x, first, p.tile.streamed)
      return visible(x, bounds, columns, start)

  return x, seen, dropout_mask(x, first, start)


def apply_dropout(p: Problem, e: jax.Array, keep: jax.Array) -> jax.Array:
  """Applies dropout: scales kept probabilities, zeroes the others."""
  return jnp.where(keep, e * (1 / (1 - p.spec.dropout_rate)), 0.0)


def _indices(p: Problem, axis: int, first: Any) -> jax.Array:
  """Returns first, first + 1, ... along an axis of a tile.

  A thread holds two neighbours of every eight columns, and all its others
  differ by constants: added in another order, each would occupy a register over
  the loop. Only narrow heads with `mma` spill less in the plain order.
  """
  size, kind = shape(p), layout(p)
  if p.spec.blocks.cores == "mma" and max(p.dims[5:]) <= WIDE_HEAD_DIM:
    return plgpu.broadcasted_iota(jnp.int32, size, axis, layout=kind) + first
  n = plgpu.broadcasted_iota(
    jnp.int32, (size[axis],), 0, layout=kind.reduce(1 - axis)
  )
  low = n & 7 if axis else n
  return broadcast_vector((low + first) + (n - low), size, axis)


def _vectors(x, array, names, start, size, across) -> dict[str, jax.Array]:
  if not names:
    return {}
  ref = x.refs[array]
  b = x.b if ref.shape[0] > 1 else 0
  return {
    name: plgpu.load(
      ref.at[b, n, pl.ds(start, size)],
      layout=layout(x.p).reduce(across),
      optimized=False,
    )
    for n, name in enumerate(names)
  }
