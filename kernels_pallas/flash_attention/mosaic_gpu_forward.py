"""The forward GPU kernel: FlashAttention-3's warp-specialised online softmax.

A block is one head and 64 queries for each computing warpgroup. Two of them
take turns: while one runs its softmax the other has the tensor cores ("ping
pong", Shah et al. 2024, section 3.1). Blocks with the most tiles, the last
ones under a causal mask, start first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention import mosaic_gpu_stream as stream
from kernels_pallas.flash_attention import mosaic_gpu_tile as tile
from kernels_pallas.flash_attention.mosaic_gpu_problem import Problem
from kernels_pallas.flash_attention.mosaic_gpu_tiling import ROWS
from kernels_pallas.flash_attention.mosaic_tpu_problem import varying


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and log-sum-exp [B, N, T], padding included.

  Args:
    p: The problem, keys streamed.
    interpret: As of `plgpu.kernel`.
  """
  B, N, _, T, _, _, Hv = p.dims
  q = p.arrays["q"]
  call = plgpu.kernel(
    functools.partial(_kernel, p),
    out_type=[
      varying(q, (B, T, N, Hv), p.spec.output or q.dtype),
      varying(q, (B, N, T), jnp.float32),
    ],
    scratch_types=[_buffers(p), *_barriers(p)],
    grid=(N, p.lines, B),
    grid_names=("head", "line", "batch"),
    num_threads=p.tile.groups + 1,
    thread_name=stream.GROUP,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="flash_attention_forward",
    interpret=interpret,
    **stream.estimate(p, 2),
  )
  return tuple(call(p.arrays))


def _buffers(p: Problem) -> dict[str, Any]:
  (_, _, _, _, _, H, Hv), t, dtype = p.dims, p.tile, p.arrays["q"].dtype
  found = {
    "q": stream.buffer((t.groups, ROWS, H), dtype),
    "k": stream.buffer((t.stages[0], t.streamed, H), dtype),
    "v": stream.buffer((t.stages[1], t.streamed, Hv), dtype),
    "lse": plgpu.SMEM((t.groups, ROWS), jnp.float32),
  }
  # The output takes the place of the queries where it has their width.
  if Hv != H:
    found["o"] = stream.buffer((t.groups, ROWS, Hv), dtype)
  if p.spec.blocks.operand == "shared":
    found["p"] = stream.buffer((t.groups, ROWS, t.streamed), dtype)
  return found


def _barriers(p: Problem) -> list[Any]:
  """Of the stream (k, v), of the queries, and of the turns."""
  groups = p.tile.groups
  return [
    stream.barriers(p, (1, 1)),
    plgpu.Barrier(num_barriers=groups),
    plgpu.Barrier(num_arrivals=groups) if groups == 2 else None,  # noqa: PLR2004
  ]


def _kernel(p, refs, o_ref, lse_ref, smem, pipe, q_ready, turns):
  b, h = lax.axis_index("batch"), lax.axis_index("head")
  row = p.lines - 1 - lax.axis_index("line")
  line = stream.line(p, refs["table"], b, row)

  def compute(group):
    _compute(p, refs, (o_ref, lse_ref), smem, (pipe, q_ready, turns), line,
             (b, h, row, group))  # fmt: skip

  def copy():
    stream.produce(line, *pipe, stream.of_keys(p, refs, smem, b, h))

  stream.roles(p, compute, copy)


def _compute(p, refs, outputs, smem, barriers, line, place):
  (b, h, row, group), (pipe, q_ready, turns) = place, barriers
  start = row * p.tile.rows + group * ROWS
  q = smem["q"].at[group]
  operand = smem["p"].at[group] if "p" in smem else None
  x = tile.View(p, refs, operand, b, h)
  queries = refs["q"].at[b, pl.ds(start, ROWS), h]
  plgpu.copy_gmem_to_smem(queries, q, q_ready.at[group])
  bounds = tile.of_queries(x, start, ROWS)
  plgpu.barrier_wait(q_ready.at[group])

  def turn():
    if turns is not None:
      plgpu.barrier_arrive(turns)
      plgpu.barrier_wait(turns)

  pl.when(line.steps > 0)(lambda: plgpu.barrier_wait(pipe[0][0].at[0]))
  pl.when(group == 1)(turn)
  step = functools.partial(_step, x, q, smem, pipe, turn, line, bounds, start)
  acc, m, l = stream.consume(
    line, step, (tile.zeros(ROWS, p.dims[-1]), *tile.nothing(x))
  )  # fmt: skip
  pl.when(group == 0)(turn)
  _store(p, acc, m, l, outputs, smem, (b, h, start, group))


def _step(x, q, smem, pipe, turn, line, bounds, start, n, where, slots, carry,
          masked):  # fmt: skip
  """Scores of one tile, their softmax, and the product with its values."""
  p, ((k_full, v_full), (k_free, v_free)) = x.p, pipe
  k_slot, v_slot = slots
  s = tile.product(q, smem["k"].at[k_slot], turn)
  plgpu.barrier_arrive(k_free.at[k_slot])
  seen, drop = None, lambda y: y
  if masked or p.spec.dropout_rate:
    k = where()[1] * p.tile.streamed
    drop = tile.dropper(x, start, k)
  if masked:
    seen = tile.visible(x, bounds, tile.of_keys(x, k, p.tile.streamed), k)
  acc, m_new, l, e = tile.softmax(p, s, seen, carry)
  e = drop(e).astype(smem["v"].dtype)
  acc, l, m_new, e = lax.optimization_barrier((acc, l, m_new, e))
  turn()
  plgpu.barrier_wait(v_full.at[v_slot])

  def free():
    # Waits for the next keys while the matmul runs.
    @pl.when(n + 1 < line.steps)
    def _wait():
      plgpu.barrier_wait(k_full.at[stream.slots(p, n + 1)[0]])

  acc = tile.accumulate(x, acc, e, smem["v"].at[v_slot], free)
  plgpu.barrier_arrive(v_free.at[v_slot])
  return acc, m_new, l


def _store(p, acc, m, l, outputs, smem, place):
  """Results to memory."""
  (b, h, start, group), (o_ref, lse_ref) = place, outputs
  o_smem, lse_smem = smem.get("o", smem["q"]).at[group], smem["lse"].at[group]
  o, lse = tile.normalised(acc, m, l)
  lse_smem[...] = lse
  queries = pl.ds(start, ROWS)
  tile.store(o_smem, o, o_ref.at[b, queries, h])
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, h, queries])
  plgpu.wait_smem_to_gmem(0)
