"""Operations of the TPU kernels on a part of a tile: logits, masks, dropout.

Scores are transposed, [keys, queries]: maxima and sums over keys are
elementwise operations on whole registers, and a value per query is a row
(kernels_pallas/MATH.md 6).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu.problem import Problem
from kernels_pallas.masks import intervals

SUBLANES = 8
LOG2E = math.log2(math.e)

# Contractions: over the last axes, the first axes, an ordinary product.
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


class View(NamedTuple):
  """A tile inside a kernel.

  Fields: p, the problem; refs, references to its blocks by name; seed, a
  reference; b, h, i, j, the tile's indices; masked, whether some pair may be
  invisible.
  """

  p: Problem
  refs: dict[str, Any]
  seed: Any
  b: Any
  h: Any
  i: Any
  j: Any
  masked: bool


class Part(NamedTuple):
  """Queries [q, q + q_part) and keys [kv, kv + kv_part) of a tile."""

  q: int
  kv: int


class Logits(NamedTuple):
  """Fields: t, transposed logits times `unit`; slope of the soft cap, or None;
  kept by dropout, or None."""

  t: jax.Array
  slope: jax.Array | None
  kept: jax.Array | None


def unit(p: Problem) -> float:
  """Returns the factor on logits: log2(e), so that exponentials are exp2.

  1 with a bias, which may be the lowest finite number.
  """
  return LOG2E if "bias" not in p.arrays else 1.0


def dot(p: Problem, a: jax.Array, b: jax.Array, dims) -> jax.Array:
  """A matmul with sums in the accumulator dtype."""
  return jax.lax.dot_general(
    a, b, dims, precision=p.spec.precision, preferred_element_type=p.dtype
  )


def parts(p: Problem) -> Iterator[Part]:
  """Yields all parts of a tile, keys fastest."""
  t = p.tile
  for q in range(0, t.q, t.q_part):
    for kv in range(0, t.kv, t.kv_part):
      yield Part(q, kv)


def queries(p: Problem, part: Part) -> pl.Slice:
  """Returns the slice of a part's queries."""
  return pl.ds(part.q, p.tile.q_part)


def keys(p: Problem, part: Part) -> pl.Slice:
  """Returns the slice of a part's keys."""
  return pl.ds(part.kv, p.tile.kv_part)


def products(x: View, part: Part) -> jax.Array:
  """Returns k q^T of a part."""
  q, k = x.refs["q"][queries(x.p, part)], x.refs["k"][keys(x.p, part)]
  return dot(x.p, k, q, NT)


def exponential(p: Problem, t: jax.Array) -> jax.Array:
  """Returns exp of differences of logits that were multiplied by `unit`."""
  return jnp.exp2(t if unit(p) == LOG2E else t * LOG2E)


def logits(x: View, part: Part, s: jax.Array) -> Logits:
  """Returns the logits of a part from its `products`."""
  p, spec, slope = x.p, x.p.spec, None
  factor = unit(p)
  bias = _bias(x, part)
  t = s * (spec.scale * (factor if spec.softcap is None else 1.0))
  if bias is not None and spec.bias_before_softcap:
    t = t + bias
    if x.masked:
      t = jnp.where(_visible(x, part), t, 0)  # the slope at NaN is NaN
  if spec.softcap is not None:
    tanh = jnp.tanh(t / spec.softcap)
    t, slope = (spec.softcap * factor) * tanh, 1 - tanh * tanh
  if bias is not None and not spec.bias_before_softcap:
    t = t + bias
  if x.masked:
    t = jnp.where(_visible(x, part), t, -jnp.inf)
  return Logits(t, slope, _kept(x, part))


def drop(p: Problem, y: jax.Array, kept: jax.Array | None) -> jax.Array:
  """Applies dropout: scales kept elements, zeroes the others."""
  if kept is None:
    return y
  return jnp.where(kept, y * (1 / (1 - p.spec.dropout_rate)), 0)


def visit(p: Problem, kind: jax.Array, run: Callable[[bool], None]) -> None:
  """Calls `run(masked)` by the tile's class; compiles only what occurs."""
  kinds = p.kinds()
  if kinds == (intervals.FULL,):
    run(False)
    return
  for this, masked in ((intervals.FULL, False), (intervals.PARTIAL, True)):
    if this in kinds:
      pl.when(kind == this)(functools.partial(run, masked))


def _bias(x: View, part: Part) -> jax.Array | None:
  if "bias" not in x.refs:
    return None
  along_k, along_q = x.p.bias
  rows = keys(x.p, part) if along_k else slice(None)
  lanes = queries(x.p, part) if along_q else slice(None)
  bias = x.refs["bias"][rows, lanes].astype(x.p.dtype)
  return bias if along_q else _widen(x, bias)


def _widen(x: View, column: jax.Array) -> jax.Array:
  """Repeats [keys, lanes] over all queries of a part."""
  times = x.p.tile.q_part // column.shape[1]
  return jnp.tile(column, (1, times)) if times > 1 else column


def _visible(x: View, part: Part) -> jax.Array:
  """Returns which keys each query of a part sees, Bool [keys, queries]."""
  p, t = x.p, x.p.tile

  def row(name):
    index = p.rows.index(name)
    return x.refs["rows"][index : index + 1, queries(p, part)]

  def column(name):
    return _widen(x, x.refs["columns"][p.columns.index(name), keys(p, part), :])

  if "key" in p.columns:
    key, start = column("key"), 0
  else:
    key = jax.lax.broadcasted_iota(jnp.int32, (t.kv_part, t.q_part), 0)
    start = x.j * t.kv + part.kv
  seen = None
  for n in range(sum(name.startswith("hi") for name in p.rows)):
    inside = key < row(f"hi{n}") - start
    if f"lo{n}" in p.rows:
      inside &= key >= row(f"lo{n}") - start
    elif "key" in p.columns:
      inside &= key >= 0
    seen = inside if seen is None else seen | inside
  if "segment" in p.rows:
    seen &= row("segment") == column("segment")
  return seen


def _kept(x: View, part: Part) -> jax.Array | None:
  p, t = x.p, x.p.tile
  if not p.spec.dropout_rate:
    return None
  i = jax.lax.broadcasted_iota(jnp.int32, (1, t.q_part), 1)
  j = jax.lax.broadcasted_iota(jnp.int32, (t.kv_part, 1), 0)
  return p.spec.keep(
    x.seed[0],
    p.spec.dropout_rate,
    x.b,
    x.h,
    i + (x.i * t.q + part.q),
    j + (x.j * t.kv + part.kv),
  )
