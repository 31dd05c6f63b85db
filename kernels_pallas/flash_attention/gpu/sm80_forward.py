"""The forward kernel for GPUs before Hopper: `mma` and `cp.async`.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for an A100.

A block is 64 queries of a head. Values arrive while scores are computed, and
the next keys while probabilities are and meet the values (FlashAttention-2's
order). `mosaic_gpu_mma` says what the GPU interpreter does instead; masks,
softmax, loops and the table are the same there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu import sm80_mma as mma
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.gpu_problem import (
  Problem,
  results,
)
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import ROWS


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and log-sum-exp [B, N, T], padding included.

  Args:
    p: The problem, keys streamed, with one group.
    interpret: As of `plgpu.kernel`.
  """
  (B, N, _, _, _, H, Hv), t, q = p.dims, p.tile, p.arrays["q"]
  buffers = {
    "q": stream.buffer((1, ROWS, H), q.dtype),
    "k": stream.buffer((1, t.streamed, H), q.dtype),
    "v": stream.buffer((1, t.streamed, Hv), q.dtype),
  }
  if p.spec.blocks.operand == "shared":
    buffers["p"] = stream.buffer((ROWS, t.streamed), q.dtype)
  call = plgpu.kernel(
    functools.partial(_kernel, p, bool(interpret)),
    out_type=results(p),
    scratch_types=[buffers],
    grid=(N, p.lines, B),
    grid_names=("head", "line", "batch"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="flash_attention_forward_mma",
    interpret=interpret,
    **stream.estimate(p, 2),
  )
  return tuple(call(mma.flat(p, ("q", "k", "v"))))


def _kernel(p, interpreted, refs, o_ref, lse_ref, smem):
  b, h = lax.axis_index("batch"), lax.axis_index("head")
  row = p.lines - 1 - lax.axis_index("line")
  line = stream.line(p, refs["table"], b, row)
  start = row * p.tile.rows
  queries = pl.ds(start, ROWS)
  kv = h if p.group == 1 else lax.div(h, jnp.int32(p.group))

  def fetch(name, n):
    batch, head = lax.optimization_barrier((b, kv))
    where = batch, line.nth(n) * p.tile.streamed, head
    mma.fetch(interpreted, refs[name], smem[name], where)

  mma.fetch(interpreted, refs["q"], smem["q"], (b, start, h))
  pl.when(line.steps > 0)(lambda: fetch("k", 0))
  x = tile.View(p, refs, smem.get("p"), b, h)
  step = functools.partial(_step, x, interpreted, smem, fetch, line, start)
  acc, m, l = stream.consume(
    line, step, (tile.zeros(ROWS, p.dims[-1]), *tile.nothing(x))
  )
  mma.wait(interpreted, 0)
  o, lse = tile.normalised(acc, m, l)
  mma.store(o, o_ref.at[b, queries, h])
  mma.store(lse, lse_ref.at[b, h, queries])


def _step(x, interpreted, smem, fetch, line, start, n, where, _, carry,
          masked):  # fmt: skip
  """Scores of one tile, their softmax, and the product with its values."""
  p, x = x.p, mma.late(x)
  q, k, v = mma.again(smem, "qkv")
  fetch("v", n)
  mma.wait(interpreted, 1)
  s = mma.product(interpreted, q, k)
  # The last step fetches its own keys again: copies have no condition, and as
  # many must be under way in every step.
  fetch("k", jnp.minimum(n + 1, line.steps - 1))
  seen, first = None, 0
  if masked or p.spec.dropout_rate:
    first = where()[1] * p.tile.streamed
  if masked:
    bounds = tile.of_queries(x, lax.optimization_barrier(start), ROWS)
    columns = tile.of_keys(x, first, p.tile.streamed)
    seen = tile.visible(x, bounds, columns, first)
  acc, m, l, e = tile.softmax(p, s, seen, carry)
  if p.spec.dropout_rate:
    start, first = lax.optimization_barrier((start, first))
    e = tile.dropped(p, e, tile.keeper(mma.late(x), start, first)())
  mma.wait(interpreted, 1)
  return mma.accumulate(interpreted, x, acc, e, v), m, l
