"""The gradient of a bias: a kernel of its own, only run where there is one.

A bias is broadcast along some of (batch, head, query, key). The grid runs over
the other axes first and over those last, so that a block of the gradient stays
in VMEM while all tiles that share it are added to it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.tpu import backward_kernels as back
from kernels_pallas.flash_attention.tpu import tpu_tile as tile
from kernels_pallas.flash_attention.tpu.tpu_problem import (
  PREFETCHED,
  VMEM_LIMIT,
  Problem,
  lanes,
  operand_specs,
  varying,
)


def dbias(p: Problem, shape: tuple[int, ...], interpret: Any) -> jax.Array:
  """The gradient of a bias of `shape` [b, n, t, s], in the accumulator dtype.

  Args:
    p: The problem, with arrays do, lse and shift.
    shape: Of the bias as called; each axis whole or 1.
    interpret: As of `pl.pallas_call`.
  """
  (B, N, _, T, S, _, _), t = p.dims, p.tile
  along_k, along_q = shape[3] > 1, shape[2] > 1
  sizes = (B, N, *p.tiles)
  varies = (shape[0] > 1, shape[1] > 1, along_q, along_k)
  kept = [a for a in range(4) if varies[a]]
  order = [*kept, *(a for a in range(4) if a not in kept)]
  place = _place(p, order)
  # What has no queries is repeated over lanes, what has no keys over sublanes.
  block = (t.kv if along_k else _sublanes(p), t.q if along_q else lanes(t))

  def where(*ids):
    b, h, i, j, _ = place(*ids)
    b, h, i, j = (
      x if v else 0 for x, v in zip((b, h, i, j), varies, strict=True)
    )
    return b, h, j, i

  full = (*shape[:2], *(
    n if v else one
    for n, v, one in zip((S, T), (along_k, along_q), block, strict=True)
  ))  # fmt: skip
  operands = {k: v for k, v in p.arrays.items() if k not in ("seed", "sinks")}
  specs = operand_specs(p, place)
  total = pl.pallas_call(
    functools.partial(_kernel, p, place, len(kept), (along_k, along_q)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=PREFETCHED,
      grid=tuple(sizes[a] for a in order),
      in_specs=[{name: specs[name] for name in operands}],
      out_specs=pl.BlockSpec((None, None, *block), where),
    ),
    out_shape=varying(p.arrays["q"], full, p.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * len(kept)
      + ("arbitrary",) * (4 - len(kept)),
      vmem_limit_bytes=VMEM_LIMIT,
    ),
    cost_estimate=p.cost(2),
    interpret=interpret,
    name="flash_attention_dbias",
  )(jnp.asarray(p.classes, jnp.int32).reshape(-1), p.seed(), operands)
  if not along_k:
    total = total.sum(2, keepdims=True)
  if not along_q:
    total = total.sum(3, keepdims=True)
  return total.swapaxes(2, 3)[:, :, : shape[2], : shape[3]]


def _sublanes(p: Problem) -> int:
  return tile.SUBLANES if p.tile.kv_part % tile.SUBLANES == 0 else 1


def _place(p: Problem, order: list[int]):
  """Of a grid over (b, h, i, j) in the given order; the table is of classes."""
  (rows, columns), many = p.tiles, p.classes.shape[0] > 1

  def place(*ids):
    table = ids[4]
    b, h, i, j = (ids[order.index(a)] for a in range(4))
    line = b * rows + i if many else i
    return b, h, i, j, table[line * columns + j]

  return place


def _kernel(p, place, kept, varies, table, seed, refs, total):
  b, h, i, j, kind = place(*map(pl.program_id, range(4)), table)
  first = functools.reduce(
    jnp.logical_and, (pl.program_id(a) == 0 for a in range(kept, 4)), True
  )

  @pl.when(first)
  def _():
    total[...] = jnp.zeros(total.shape, total.dtype)

  def run(masked):
    x = tile.View(p, refs, seed, b, h, i, j, masked)
    for part in tile.parts(p):
      _add(x, part, varies, total)

  tile.visit(p, kind, run)


def _add(x: tile.View, part, varies, total):
  """Adds a part's gradient, summed along the axes of the broadcast."""
  along_k, along_q = varies
  value = back.logit_gradient(x, part)
  k, q = value.shape
  if not along_k:
    value = value.reshape(-1, total.shape[0], q).sum(0)
  if not along_q:
    width = total.shape[1]
    pieces = (value[:, n : n + width] for n in range(0, q, width))
    value = functools.reduce(jnp.add, pieces)
  rows = tile.keys(x.p, part) if along_k else slice(None)
  columns = tile.queries(x.p, part) if along_q else slice(None)
  total[rows, columns] += value
