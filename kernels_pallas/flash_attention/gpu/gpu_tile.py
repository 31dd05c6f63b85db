"""What the GPU kernels do with a tile: logits, masks, dropout.

Everything works on values of one warpgroup, 64 rows in the layout of `wgmma` or
128 in one of tensor memory (`layout`). Rows are queries in the kernels that
stream keys, and keys in the one that streams queries; `along` is the axis of
the queries.
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

from kernels_pallas.flash_attention.gpu.gpu_problem import KEYS, Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import ROWS

LOG2E = math.log2(math.e)
LN2 = math.log(2)

WIDE = 128
"""Head dim above which accumulators take half of the registers there are."""


class View(NamedTuple):
  """What a warpgroup sees.

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
  """Fields: t, base-2 logits but for a factor; factor; slope of the soft cap
  or None."""

  t: jax.Array
  factor: float
  slope: jax.Array | None


def shape(p: Problem) -> tuple[int, int]:
  """Rows and columns of a warpgroup's scores."""
  return p.tile.height, p.tile.streamed


def layout(p: Problem) -> Any:
  """How a warpgroup's registers hold its scores.

  With 'tcgen05' a thread has a row, which needs no shuffle to sum it up, but a
  register for each column of what lies along the row: where there is such a
  thing, or a hash of dropout, four threads share rows as with 'wgmma'.
  """
  if p.spec.blocks.cores != "tcgen05":
    return plgpu.Layout.WGMMA
  if p.streamed == KEYS and not (p.columns or p.spec.dropout_rate):
    return plgpu.Layout.TCGEN05_TMEM_NATIVE
  return plgpu.Layout.TCGEN05


def zeros(*size: int) -> jax.Array:
  """An accumulator, in the layout of `wgmma`."""
  return plgpu.layout_cast(
    jnp.zeros(size, jnp.float32), plgpu.Layout.WGMMA
  )  # fmt: skip


def vector(
  value: Any, rows: int = ROWS, kind: Any = plgpu.Layout.WGMMA
) -> jax.Array:
  """`value` for each row.

  Args:
    value: A number.
    rows: How many there are.
    kind: As `layout` gives it.
  """
  return plgpu.layout_cast(
    jnp.full((rows,), value, jnp.float32), kind.reduce(1)
  )  # fmt: skip


def spread(x: jax.Array, like: tuple[int, ...], axis: int) -> jax.Array:
  """Repeats a vector that lies along `axis`."""
  return lax.broadcast_in_dim(x, like, [axis])


def logits(p: Problem, s: jax.Array, seen: jax.Array | None) -> Logits:
  """The logits of scores q.k; invisible ones are -inf.

  Args:
    p: The problem.
    s: Products.
    seen: Which are visible, or None: all.
  """
  spec, slope = p.spec, None
  t, factor = s, spec.scale * LOG2E
  if spec.softcap is not None:
    # tanh of the hardware is good to 11 bits only: too little for logits.
    root = lax.rsqrt(1 + jnp.exp2(s * (2 * spec.scale * LOG2E / spec.softcap)))
    t, factor = 1 - 2 * root * root, spec.softcap * LOG2E
    slope = 1 - t * t
  elif spec.scale <= 0:
    t, factor = s * factor, 1.0
  if seen is not None:
    t = jnp.where(seen, t, -jnp.inf)
  return Logits(t, factor, slope)


def probabilities(
  x: View,
  s: jax.Array,
  lse: jax.Array,
  seen: Callable[[], jax.Array] | None,
  kept: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Those of a tile once more (kernels.md 2.2), and what they weigh in dS.

  The weight is all that has to wait for the gradient of the probabilities, one
  register an element: the probability times the slope of the soft cap, neither
  of which is negative, with the sign of what dropout keeps.

  Args:
    x: The view.
    s: Products of queries and keys.
    lse: Base-2 log-sum-exps of the queries, +inf where there is none.
    seen: Gives which are visible, or None: all.
    kept: Gives which dropout keeps, or None: all, or they were asked before.

  Returns:
    Probabilities after dropout, and weights, not positive where dropped.
  """
  t, factor, slope = logits(x.p, s, None if seen is None else seen())
  e = jnp.exp2(t * factor - spread(lse, t.shape, x.along))
  weight = e if slope is None else e * slope
  if kept is None:
    return e, weight
  keep = kept()
  return dropped(x.p, e, keep), jnp.where(keep, weight, -weight)


def slopes(
  x: View,
  weight: jax.Array,
  dp: jax.Array,
  shift: jax.Array,
  signed: bool = False,
) -> jax.Array:
  """dS of a tile: the gradient of its logits, but for the scale.

  Args:
    x: The view.
    weight: As `probabilities` gave it.
    dp: Gradient of the probabilities; after dropout, if weights are signed.
    shift: delta of the queries minus the cotangent of their log-sum-exp.
    signed: Whether the sign of a weight says what was dropped.
  """
  shift = spread(shift, dp.shape, x.along)
  if not signed:
    return weight * (dp - shift)
  # Of what was dropped it is |weight| (0 - shift), and the weight has a minus.
  dp = dp * (1 / (1 - x.p.spec.dropout_rate))
  return weight * jnp.where(weight > 0, dp - shift, shift)


def nothing(x: View) -> tuple[jax.Array, jax.Array]:
  """Maximum and sum of exponentials before the first key: those of sinks."""
  along = functools.partial(vector, rows=x.p.tile.height, kind=layout(x.p))
  if "sinks" in x.refs:
    return along(x.refs["sinks"][x.h] * LOG2E), along(1.0)
  return along(-jnp.inf), along(0.0)


def scaled(acc: jax.Array, alpha: jax.Array) -> jax.Array:
  """Rows times a factor each."""
  return acc * spread(alpha, acc.shape, 0)


def softmax(
  p: Problem,
  s: jax.Array,
  seen: jax.Array | None,
  carry: tuple[Any, ...],
  scale: Callable[[Any, jax.Array], Any] = scaled,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
  """A step of the online softmax: (acc, m, l, e), acc without the new tile.

  Args:
    p: The problem.
    s: Products of queries and keys.
    seen: Which are visible, or None: all.
    carry: acc, m (in base 2) and l so far.
    scale: Multiplies the rows of acc, wherever that is.
  """
  acc, m, l = carry
  t, factor, _ = logits(p, s, seen)
  m_new = jnp.maximum(m, t.max(axis=1) * factor)
  # No key seen so far: any finite number, so that exponentials are 0, not NaN.
  shift = m_new if seen is None else jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  e = jnp.exp2(t * factor - spread(shift, t.shape, 0))
  acc = scale(acc, alpha)
  return acc, m_new, l * alpha + e.sum(axis=1), e


def normalised(
  acc: Any,
  m: jax.Array,
  l: jax.Array,
  scale: Callable[[Any, jax.Array], Any] = scaled,
) -> tuple[Any, jax.Array]:
  """o = acc / l and lse = m + log l, natural; 0 and -inf where l = 0.

  Args:
    acc, m, l: As `softmax` left them.
    scale: Multiplies the rows of acc, wherever that is.
  """
  empty = l == 0
  factor = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, l))
  lse = m * LN2 + jnp.log(jnp.where(empty, 1.0, l))
  return scale(acc, factor), jnp.where(empty, -jnp.inf, lse)


def of_queries(x: View, start: Any, size: int) -> dict[str, jax.Array]:
  """What the mask says of queries [start, start + size), by name."""
  return _vectors(x, "rows", x.p.rows, start, size, 1 - x.along)


def of_keys(x: View, start: Any, size: int) -> dict[str, jax.Array]:
  """What the mask says of keys [start, start + size), by name."""
  return _vectors(x, "columns", x.p.columns, start, size, x.along)


def visible(x: View, rows, columns, start: Any) -> jax.Array:
  """Which pairs of a tile see each other.

  Args:
    x: The view.
    rows: What `of_queries` gave.
    columns: What `of_keys` gave.
    start: First key.
  """
  p, size, along = x.p, shape(x.p), x.along
  if "key" in columns:
    key, start = spread(columns["key"], size, 1 - along), 0
  else:
    key = plgpu.broadcasted_iota(
      jnp.int32, size, 1 - along, layout=layout(p)
    )  # fmt: skip
  seen = None
  for n in range(sum(name.startswith("hi") for name in p.rows)):
    inside = key < spread(rows[f"hi{n}"] - start, size, along)
    if f"lo{n}" in rows:
      inside &= key >= spread(rows[f"lo{n}"] - start, size, along)
    elif "key" in columns:
      inside &= key >= 0
    seen = inside if seen is None else seen | inside
  if "segment" in rows:
    ours = spread(rows["segment"], size, along)
    seen &= ours == spread(columns["segment"], size, 1 - along)
  return seen


def keeper(x: View, q: Any, k: Any) -> Callable[[], jax.Array] | None:
  """What gives which probabilities of a tile dropout keeps, or None: all.

  It is called where they are used: across a barrier in memory they are
  registers.

  Args:
    x: The view.
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


def of_passing_queries(
  x: View,
  where: Callable[[], tuple[Any, Any]],
  masked: bool,
  columns: dict[str, jax.Array],
  start: Any,
) -> tuple[View, Callable[[], jax.Array] | None, Any]:
  """What a tile of queries that passes by sees of the keys that stay.

  Args:
    x: The view, of a key head.
    where: Gives (query head of the group, tile).
    masked: Whether not all is visible.
    columns: What `of_keys` gave.
    start: First key.

  Returns:
    The view of the query head, where that matters; what gives which pairs are
    visible, or None: all; and what gives which dropout keeps, likewise.
  """
  p, first, seen = x.p, 0, None
  if masked or p.spec.dropout_rate:
    head, i = where()
    first, x = i * p.tile.streamed, x._replace(h=x.h * p.group + head)
  if masked:

    def seen():
      bounds = of_queries(x, first, p.tile.streamed)
      return visible(x, bounds, columns, start)

  return x, seen, keeper(x, first, start)


def dropped(p: Problem, e: jax.Array, keep: jax.Array) -> jax.Array:
  """Probabilities after dropout: those kept, scaled, and zeros."""
  return jnp.where(keep, e * (1 / (1 - p.spec.dropout_rate)), 0.0)


def _indices(p: Problem, axis: int, first: Any) -> jax.Array:
  """first, first + 1, ... along an axis of a tile.

  A thread has two neighbours of every eight columns, and all others are
  constants away: added up in another order, each would be a register over the
  loop. Only narrow heads with `mma` spill less in the plain order.
  """
  size, kind = shape(p), layout(p)
  if p.spec.blocks.cores == "mma" and max(p.dims[5:]) <= WIDE:
    return plgpu.broadcasted_iota(jnp.int32, size, axis, layout=kind) + first
  n = plgpu.broadcasted_iota(
    jnp.int32, (size[axis],), 0, layout=kind.reduce(1 - axis)
  )
  low = n & 7 if axis else n
  return spread((low + first) + (n - low), size, axis)


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
