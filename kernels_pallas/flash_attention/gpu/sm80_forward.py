"""Forward flash attention kernel for Ampere and Ada (sm80): `mma`, `cp.async`.

Not yet run on a GPU: the interpreter checks numbers and races, ptxas for an
A100 registers and spills.

A block is 64 queries of a head. Values arrive while scores are computed, and
the next keys during the softmax and the product with the values
(FlashAttention-2's order). `sm80_mma` describes what the GPU interpreter does
instead of `mma`; masks, softmax, loops and the table are the same there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import sm80_mma as mma
from kernels_pallas.flash_attention.gpu import tile
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.problem import (
  Problem,
  output_types,
)
from kernels_pallas.flash_attention.gpu.tile_sizes import ROWS


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, T, N, Hv] and log-sum-exp [B, N, T], padded.

  Args:
    p: The problem, keys streamed, with one group.
    interpret: As in `plgpu.kernel`.
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
    out_type=output_types(p),
    scratch_types=[buffers],
    grid=(N, p.lines, B),
    grid_names=("head", "line", "batch"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="flash_attention_forward_mma",
    interpret=interpret,
    **stream.cost_estimate(p, 2),
  )
  return tuple(call(mma.flatten_heads(p, ("q", "k", "v"))))


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
  x = tile.TileContext(p, refs, smem.get("p"), b, h)
  step = functools.partial(_step, x, interpreted, smem, fetch, line, start)
  acc, m, l = stream.consume(
    line, step, (tile.zeros(ROWS, p.dims[-1]), *tile.initial_softmax(x))
  )
  mma.wait(interpreted, 0)
  o, lse = tile.normalise(acc, m, l)
  mma.store(o, o_ref.at[b, queries, h])
  mma.store(lse, lse_ref.at[b, h, queries])


def _step(x, interpreted, smem, fetch, line, start, n, where, _, carry,
          masked):  # fmt: skip
  """Computes a tile's scores, softmax, and the product with its values."""
  p, x = x.p, mma.hide_from_hoisting(x)
  q, k, v = mma.loop_buffers(smem, "qkv")
  fetch("v", n)
  mma.wait(interpreted, 1)
  s = mma.product(interpreted, q, k)
  # The last step fetches its own keys again: copies are unconditional, and
  # every step must have the same number in flight.
  fetch("k", jnp.minimum(n + 1, line.steps - 1))
  seen, first = None, 0
  if masked or p.spec.dropout_rate:
    first = where()[1] * p.tile.streamed
  if masked:
    bounds = tile.load_query_mask(x, lax.optimization_barrier(start), ROWS)
    columns = tile.load_key_mask(x, first, p.tile.streamed)
    seen = tile.visible(x, bounds, columns, first)
  acc, m, l, e = tile.softmax(p, s, seen, carry)
  if p.spec.dropout_rate:
    start, first = lax.optimization_barrier((start, first))
    e = tile.apply_dropout(
      p, e, tile.dropout_mask(mma.hide_from_hoisting(x), start, first)()
    )
  mma.wait(interpreted, 1)
  return mma.accumulate(interpreted, x, acc, e, v), m, l
