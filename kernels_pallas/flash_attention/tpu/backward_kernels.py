"""Backward flash attention kernels for TPUs, with recomputed probabilities.

Not yet run on a TPU: the interpreter checks numbers and races, libtpu's
compiler for v4 to tpu7x schedules and spills.

`dkv` sums dk and dv over query tiles and over the query heads of a key head,
`dq` sums dq over key tiles: 7 matmuls a tile, memory linear in length. `fused`
computes all in 5 matmuls a tile; its partial dq, one for each tile of keys, are
summed by XLA, so their memory grows with the number of key tiles. Formulas:
kernels_pallas/MATH.md 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.tpu import tile
from kernels_pallas.flash_attention.tpu.problem import (
  PREFETCHED,
  VMEM_LIMIT,
  Place,
  Problem,
  key_place,
  operand_specs,
  query_place,
  varying,
)
from kernels_pallas.masks import intervals


def dkv(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """Returns dk [B, K, S, H] and dv [B, K, S, Hv], in the accumulator dtype.

  Args:
    p: The problem, with arrays do, lse and shift.
    interpret: As in `pl.pallas_call`.
  """
  return _over_keys(p, interpret, fused=())


def fused(p: Problem, interpret: Any) -> tuple[jax.Array, ...]:
  """Returns dq [B, N, T, H], dk and dv; arguments as in `dkv`."""
  (B, N, _, T, _, H, _), (_, columns) = p.dims, p.tiles
  shape = varying(p.arrays["q"], (columns, B, N, T, H), p.dtype)
  dk, dv, parts = _over_keys(p, interpret, fused=(shape,))
  # Partial results of tiles that are not visited were never written.
  visited = jnp.asarray(p.classes != intervals.EMPTY)
  visited = jnp.repeat(visited, p.tile.q, axis=1).transpose(2, 0, 1)
  dq = jnp.where(visited[:, :, None, :, None], parts, 0).sum(0)
  return dq, dk, dv


def dq(p: Problem, interpret: Any) -> jax.Array:
  """Returns dq [B, N, T, H] in the accumulator dtype; arguments as in `dkv`."""
  (B, N, _, T, _, H, _), t = p.dims, p.tile
  place = query_place(p)
  return _call(
    p,
    functools.partial(_dq_kernel, p, place),
    place,
    grid=(B, N, p.tiles[0], p.width(2)),
    summed=1,
    out_specs=pl.BlockSpec(
      (None, None, t.q, H), lambda b, h, i, *_: (b, h, i, 0)
    ),
    out_shape=varying(p.arrays["q"], (B, N, T, H), p.dtype),
    scratch_shapes=[pltpu.VMEM((H, t.q), p.dtype)],
    matmuls=3,
    axis=2,
    interpret=interpret,
    name="flash_attention_dq",
  )


def _over_keys(p: Problem, interpret, fused):
  """Returns dk, dv, and partial dq if `fused` contains their type."""
  (B, _, K, _, S, H, Hv), t = p.dims, p.tile
  place = key_place(p)

  def keys(size):
    return pl.BlockSpec(
      (None, None, t.kv, size), lambda b, k, j, *_: (b, k, j, 0)
    )

  def part(*ids):
    b, h, i, j, _ = place(*ids)
    return j, b, h, i, 0

  part_spec = pl.BlockSpec((None, None, None, t.q, H), part)
  k = p.arrays["k"]
  scratch = [
    pltpu.VMEM((t.kv, H), p.dtype),
    pltpu.VMEM((t.kv, Hv), p.dtype),
    *(pltpu.VMEM((H, t.q), p.dtype) for _ in fused),
  ]
  return _call(
    p,
    functools.partial(_dkv_kernel, p, place),
    place,
    grid=(B, K, p.tiles[1], p.group, p.width(1)),
    summed=2,
    out_specs=[keys(H), keys(Hv), *(part_spec for _ in fused)],
    out_shape=[
      varying(k, (B, K, S, H), p.dtype),
      varying(k, (B, K, S, Hv), p.dtype),
      *fused,
    ],
    scratch_shapes=scratch,
    matmuls=4 + len(fused),
    axis=1,
    interpret=interpret,
    name="flash_attention_fused" if fused else "flash_attention_dkv",
  )


def _call(
  p: Problem,
  kernel: Any,
  place: Place,
  *,
  grid: tuple[int, ...],
  summed: int,
  out_specs: Any,
  out_shape: Any,
  scratch_shapes: list[Any],
  matmuls: int,
  axis: int,
  interpret: Any,
  name: str,
):
  """Calls a backward kernel that sums over its last `summed` grid axes."""
  operands = {k: v for k, v in p.arrays.items() if k not in ("seed", "sinks")}
  specs = operand_specs(p, place)
  semantics = ("parallel",) * (len(grid) - summed) + ("arbitrary",) * summed
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=PREFETCHED,
      grid=grid,
      in_specs=[{name: specs[name] for name in operands}],
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=p.cost(matmuls),
    interpret=interpret,
    name=name,
  )(p.table(axis), p.seed(), operands)


def _dkv_kernel(p, place, table, seed, refs, dk, dv, *rest):
  dq_part, dk_sum, dv_sum, dq_sum = (
    (rest[0], *rest[1:]) if len(rest) == 4 else (None, *rest, None)
  )
  b, h, i, j, kind = place(*map(pl.program_id, range(5)), table)
  g, w = pl.program_id(3), pl.program_id(4)
  last = (g == pl.num_programs(3) - 1) & (w == pl.num_programs(4) - 1)

  @pl.when((g == 0) & (w == 0))
  def _():
    dk_sum[...] = jnp.zeros(dk_sum.shape, dk_sum.dtype)
    dv_sum[...] = jnp.zeros(dv_sum.shape, dv_sum.dtype)

  def run(masked):
    x = tile.View(p, refs, seed, b, h, i, j, masked)
    _sweep(x, _by_keys(p), dq_sum, dk_sum, dv_sum)
    if dq_part is not None:
      dq_part[...] = (dq_sum[...] * p.spec.scale).T

  tile.visit(p, kind, run)

  @pl.when(last)
  def _():
    dk[...] = dk_sum[...] * p.spec.scale
    dv[...] = dv_sum[...]


def _dq_kernel(p, place, table, seed, refs, dq, dq_sum):
  b, h, i, j, kind = place(*map(pl.program_id, range(4)), table)
  w = pl.program_id(3)

  @pl.when(w == 0)
  def _():
    dq_sum[...] = jnp.zeros(dq_sum.shape, dq_sum.dtype)

  def run(masked):
    x = tile.View(p, refs, seed, b, h, i, j, masked)
    _sweep(x, list(tile.parts(p)), dq_sum)

  tile.visit(p, kind, run)

  @pl.when(w == pl.num_programs(3) - 1)
  def _():
    dq[...] = (dq_sum[...] * p.spec.scale).T


def _by_keys(p: Problem) -> list[tile.Part]:
  """Returns all parts of a tile, queries fastest."""
  return sorted(tile.parts(p), key=lambda part: part.kv)


def _sweep(x: tile.View, todo, dq_sum, dk_sum=None, dv_sum=None):
  """Adds a tile's gradients to the accumulators that are given.

  As in the forward kernel, the matmuls of the previous and the next part
  surround the exponentials of a part. If dk and dq are both computed, dq is
  only this tile's.
  """
  alone = dq_sum is not None and dk_sum is not None
  started = set()

  def add(part, p, dt):
    if dk_sum is not None:
      keys = tile.keys(x.p, part)
      q, do = (_queries(x, name, part) for name in ("q", "do"))
      dv_sum[keys] += tile.dot(x.p, p, do, tile.NN)
      dk_sum[keys] += tile.dot(x.p, dt, q, tile.NN)
    if dq_sum is not None:
      here = tile.queries(x.p, part)
      k = x.refs["k"][tile.keys(x.p, part)]
      value = tile.dot(x.p, k, dt, tile.TN)
      fresh = alone and part.q not in started
      dq_sum[:, here] = value if fresh else dq_sum[:, here] + value
      started.add(part.q)

  products, previous = _products(x, todo[0]), None
  for n, part in enumerate(todo):
    following = _products(x, todo[n + 1]) if n + 1 < len(todo) else None
    p, dt, _ = _gradients(x, part, *products)
    dtype = x.refs["q"].dtype
    if previous is not None:
      add(*previous)
    previous, products = (part, p.astype(dtype), dt.astype(dtype)), following
  add(*previous)


def _products(x: tile.View, part):
  v = x.refs["v"][tile.keys(x.p, part)]
  dp = tile.dot(x.p, v, _queries(x, "do", part), tile.NT)
  return tile.products(x, part), dp


def _gradients(x: tile.View, part, s, dp):
  """Returns a part's probabilities after dropout, and its logits' gradients.

  The first gradient is with respect to the product times scale, the second with
  respect to the logits after the soft cap.
  """
  here = tile.queries(x.p, part)
  t, slope, kept = tile.logits(x, part, s)
  p = tile.exponential(x.p, t - x.refs["lse"][:, here])
  du = p * (tile.drop(x.p, dp, kept) - x.refs["shift"][:, here])
  dt = du if slope is None else du * slope
  return tile.drop(x.p, p, kept), dt, du


def logit_gradient(x: tile.View, part: tile.Part) -> jax.Array:
  """Returns a part's gradient with respect to the bias, transposed."""
  _, dt, du = _gradients(x, part, *_products(x, part))
  return dt if x.p.spec.bias_before_softcap else du


def _queries(x: tile.View, name: str, part):
  return x.refs[name][tile.queries(x.p, part)]
