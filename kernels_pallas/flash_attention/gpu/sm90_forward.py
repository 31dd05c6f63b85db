"""The forward GPU kernel: FlashAttention-3's warp-specialised online softmax.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for an H100.

A line of work is one head and 64 queries for each computing warpgroup. Two of
them take turns: while one runs its softmax the other has the tensor cores
("ping pong", Shah et al. 2024, section 3.1). The kernel is persistent: a block
of threads takes line after line (`mosaic_gpu_schedule`), and the next line's
queries, keys and values are on their way while this one is finished and stored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu import persistent as schedule
from kernels_pallas.flash_attention.gpu import sm90_wgmma as wgmma
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.gpu_problem import (
  Problem,
  results,
)
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import ROWS

REDUCTION_BYTES = 2048
"""Of shared memory, which Mosaic GPU sets aside in a kernel with sums."""


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and log-sum-exp [B, N, T], padding included.

  Args:
    p: The problem, keys streamed.
    interpret: As of `plgpu.kernel`.
  """
  kernel, scratch, out = functools.partial(_kernel, p), _scratch(p), results(p)
  name = "forward"
  return tuple(schedule.call(p, kernel, scratch, out, 2, interpret, name))


def _scratch(p: Problem) -> list[Any]:
  """Types of shared memory: buffers, and barriers."""
  (_, _, _, _, _, H, Hv), t, dtype = p.dims, p.tile, p.arrays["q"].dtype
  shapes = stream.shapes(p, {"q": H}, {"k": H, "v": Hv})
  if p.spec.blocks.operand == "shared":
    shapes["p"] = (t.groups, ROWS, t.streamed)
  found = {name: stream.buffer(shape, dtype) for name, shape in shapes.items()}
  found["lse"] = plgpu.SMEM((t.groups, ROWS), jnp.float32)
  # The output takes the place of the queries where there is no room for both.
  both = found | {"o": stream.buffer((t.groups, ROWS, Hv), dtype)}
  barriers = _barriers(p)
  if Hv != H or stream.room([both, *barriers], REDUCTION_BYTES):
    found = both
  stream.check(p, [found, *barriers], REDUCTION_BYTES)
  return [found, *barriers]


def _barriers(p: Problem) -> list[Any]:
  """Of the stream (k, v), of the queries, and of the turns."""
  groups = p.tile.groups
  return [
    stream.barriers(p, (1, 1)),
    plgpu.Barrier(num_barriers=groups),
    plgpu.Barrier(num_arrivals=groups) if groups == 2 else None,  # noqa: PLR2004
  ]


def _kernel(p, refs, o_ref, lse_ref, smem, pipe, q_ready, turns):
  def copy(line, b, h):
    stream.produce(line, *pipe, stream.of_keys(p, refs, smem, b, h))

  schedule.run(
    p,
    refs,
    apart="o" in smem,
    copy=copy,
    fetch=stream.fetch(refs, smem, q_ready, ("q",)),
    compute=functools.partial(_compute, p, refs, smem, (pipe, q_ready, turns)),
    store=functools.partial(_store, (o_ref, lse_ref), smem),
  )


def _compute(p, refs, smem, barriers, line, place):
  """(acc, m, l) of a line."""
  (b, h, start, group, _), (pipe, q_ready, turns) = place, barriers
  operand = smem["p"].at[group] if "p" in smem else None
  x = tile.View(p, refs, operand, b, h)
  bounds = tile.of_queries(x, start, ROWS)
  plgpu.barrier_wait(q_ready.at[group])

  def turn():
    if turns is not None:
      plgpu.barrier_arrive(turns)
      plgpu.barrier_wait(turns)

  k_full, first = pipe[0][0], stream.slots(line, 0)[0]
  pl.when(line.steps > 0)(lambda: plgpu.barrier_wait(k_full.at[first]))
  pl.when(group == 1)(turn)
  step = functools.partial(
    _step, x, group, smem, pipe, turn, line, bounds, start
  )
  found = stream.consume(
    line, step, (tile.zeros(ROWS, p.dims[-1]), *tile.nothing(x))
  )
  pl.when(group == 0)(turn)
  return found


def _step(x, group, smem, pipe, turn, line, bounds, start, n, where, slots,
          carry, masked):  # fmt: skip
  """Scores of one tile, their softmax, and the product with its values."""
  p, ((k_full, v_full), (k_free, v_free)) = x.p, pipe
  k_slot, v_slot = slots
  if p.spec.dropout_rate:
    # Whose hash needs the registers that addresses of wide queries would take.
    group = lax.optimization_barrier(group)
  s = wgmma.product(smem["q"].at[group], smem["k"].at[k_slot], turn)
  plgpu.barrier_arrive(k_free.at[k_slot])
  seen, k = None, 0
  if masked or p.spec.dropout_rate:
    k = where()[1] * p.tile.streamed
  if masked:
    seen = tile.visible(x, bounds, tile.of_keys(x, k, p.tile.streamed), k)
  acc, m_new, l, e = tile.softmax(p, s, seen, carry)
  if kept := tile.keeper(x, start, k):
    e = tile.dropped(p, e, kept())
  e = e.astype(smem["v"].dtype)
  acc, l, m_new, e = lax.optimization_barrier((acc, l, m_new, e))
  turn()
  plgpu.barrier_wait(v_full.at[v_slot])

  def free():
    # Waits for the next keys while the matmul runs.
    @pl.when(n + 1 < line.steps)
    def _wait():
      plgpu.barrier_wait(k_full.at[stream.slots(line, n + 1)[0]])

  acc = wgmma.accumulate(x, acc, e, smem["v"].at[v_slot], free)
  plgpu.barrier_arrive(v_free.at[v_slot])
  return acc, m_new, l


def _store(outputs, smem, found, at):
  """Results to memory."""
  o_ref, lse_ref = outputs
  o_smem = smem.get("o", smem["q"]).at[at.group]
  lse_smem = smem["lse"].at[at.group]
  o, lse = tile.normalised(*found)
  lse_smem[...] = lse
  wgmma.store(o_smem, o, o_ref.at[at.b, at.rows, at.h])
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[at.b, at.h, at.rows])
