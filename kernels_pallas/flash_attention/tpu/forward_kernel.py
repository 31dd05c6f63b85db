"""Forward flash attention kernel for TPUs: online softmax on transposed scores.

Not yet run on a TPU: the interpreter checks numbers and races, libtpu's
compiler for v4 to tpu7x schedules and spills.

One grid step is one tile. Its parts are unrolled such that the matmul of the
next part's scores and that of the previous part's values surround a part's
exponentials in program order: the scheduler then keeps the matrix units busy
(kernels_pallas/MATH.md 7 describes the measurement). Sums of probabilities are
kept per sublane and reduced once, at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.tpu import tile
from kernels_pallas.flash_attention.tpu.problem import (
  PREFETCHED,
  VMEM_LIMIT,
  Problem,
  operand_specs,
  query_place,
  varying,
)


def forward(p: Problem, interpret) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, N, T, Hv] and log-sum-exp [B, N, 1, T], padded.

  Args:
    p: The problem.
    interpret: As in `pl.pallas_call`.
  """
  B, N, _, T, _, _, Hv = p.dims
  operands = {k: v for k, v in p.arrays.items() if k != "seed"}
  q = p.arrays["q"]
  return pl.pallas_call(
    functools.partial(_kernel, p, query_place(p)),
    grid_spec=grid_spec(p),
    out_shape=[
      varying(q, (B, N, T, Hv), p.spec.output or q.dtype),
      varying(q, (B, N, 1, T), p.dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * 3 + ("arbitrary",),
      vmem_limit_bytes=VMEM_LIMIT,
    ),
    cost_estimate=p.cost(2),
    interpret=interpret,
    name="flash_attention_forward",
  )(p.table(2), p.seed(), operands)


def grid_spec(p: Problem) -> pltpu.PrefetchScalarGridSpec:
  """Returns the kernel's grid and the blocks of each of its steps."""
  B, N, _, _, _, _, Hv = p.dims
  place, t = query_place(p), p.tile
  out = pl.BlockSpec((None, None, t.q, Hv), lambda b, h, i, *_: (b, h, i, 0))
  row = pl.BlockSpec((None, None, 1, t.q), lambda b, h, i, *_: (b, h, 0, i))
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=PREFETCHED,
    grid=(B, N, p.tiles[0], p.width(2)),
    in_specs=[operand_specs(p, place)],
    out_specs=[out, row],
    scratch_shapes=[
      pltpu.VMEM((1, t.q), p.dtype),
      pltpu.VMEM((_sums(p), t.q), p.dtype),
      pltpu.VMEM((Hv, t.q), p.dtype),
    ],
  )


def _sums(p: Problem) -> int:
  """Returns the number of rows of partial sums of probabilities."""
  return tile.SUBLANES if p.tile.kv_part % tile.SUBLANES == 0 else 1


def _kernel(p, place, table, seed, refs, o, lse, m, l, acc):
  step = pl.program_id(3)
  b, h, i, j, kind = place(*map(pl.program_id, range(4)), table)

  @pl.when(step == 0)
  def _():
    _start(p, refs, h, m, l, acc)

  def run(masked):
    _attend(tile.View(p, refs, seed, b, h, i, j, masked), m, l, acc)

  tile.visit(p, kind, run)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    _finish(p, o, lse, m, l, acc)


def _start(p, refs, h, m, l, acc):
  """Initialises the state: no key, or only the sink, whose value is 0."""
  acc[...] = jnp.zeros(acc.shape, acc.dtype)
  # Finite, so that differences from it are never NaN.
  lowest = jnp.full(m.shape, jnp.finfo(m.dtype).min, m.dtype)
  if "sinks" not in refs:
    m[...] = lowest
    l[...] = jnp.zeros(l.shape, l.dtype)
    return
  sink = jnp.full(m.shape, refs["sinks"][h].astype(m.dtype) * tile.unit(p))
  m[...] = jnp.maximum(sink, lowest)
  # 1, or 0 for a sink of -inf, which is disabled.
  share = jnp.broadcast_to(tile.exponential(p, sink - m[...]), l.shape)
  first = jax.lax.broadcasted_iota(jnp.int32, l.shape, 0) == 0
  l[...] = jnp.where(first, share, 0)


def _attend(x: tile.View, m, l, acc):
  """Adds a tile to the state, overlapping matmuls with other parts' softmax."""
  todo = list(tile.parts(x.p))
  s, previous = tile.products(x, todo[0]), None
  for n, part in enumerate(todo):
    following = tile.products(x, todo[n + 1]) if n + 1 < len(todo) else None
    current = (part, *_softmax(x, part, s, m, l))
    if previous is not None:
      _add_values(x, *previous, acc)
    previous, s = current, following
  _add_values(x, *previous, acc)


def _softmax(x: tile.View, part, s, m, l):
  """Updates the maximum; returns a part's probabilities and the old factor."""
  p, here = x.p, tile.queries(x.p, part)
  t, _, kept = tile.logits(x, part, s)
  before = m[:, here]
  after = jnp.maximum(before, jnp.max(t, axis=0, keepdims=True))
  probabilities = tile.exponential(p, t - after)
  factor = tile.exponential(p, before - after)
  sums = probabilities.reshape(-1, _sums(p), p.tile.q_part).sum(0)
  m[:, here] = after
  l[:, here] = l[:, here] * factor + sums
  return tile.drop(p, probabilities, kept), factor


def _add_values(x: tile.View, part, probabilities, factor, acc):
  here, v = tile.queries(x.p, part), x.refs["v"][tile.keys(x.p, part)]
  values = tile.dot(x.p, v, probabilities.astype(v.dtype), tile.TN)
  acc[:, here] = acc[:, here] * factor + values


def _finish(p, o, lse, m, l, acc):
  total = jnp.sum(l[...], axis=0, keepdims=True)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  o[...] = (acc[...] * (1 / total)).T.astype(o.dtype)
  found = m[...] * (1 / tile.unit(p)) + jnp.log(total)
  lse[...] = jnp.where(empty, -jnp.inf, found)
