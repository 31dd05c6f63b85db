"""The forward kernel for Blackwell: `tcgen05` and tensor memory.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for a B200.

A line of work is one head and 128 queries for each warpgroup: two, or one for
heads above 128. Two compute softmaxes at the same time, and what one waits for,
the tensor cores do while the other one has its registers full
(FlashAttention-4's pairs of tiles). Output sums stay in tensor memory, where
each step multiplies them by what the maximum has grown. Lines, copies and masks
are those of Hopper's kernel.
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
from kernels_pallas.flash_attention.gpu import sm100_tcgen05 as tcgen05
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.gpu_problem import (
  Problem,
  results,
)
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import LANES
from kernels_pallas.flash_attention.gpu.sm90_forward import (
  REDUCTION_BYTES,
)


def forward(p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and log-sum-exp [B, N, T], padding included.

  Args:
    p: The problem, keys streamed.
    interpret: As of `plgpu.kernel`.
  """
  kernel, scratch, out = functools.partial(_kernel, p), _scratch(p), results(p)
  name = "forward_tcgen05"
  return tuple(schedule.call(p, kernel, scratch, out, 2, interpret, name))


def _scratch(p: Problem) -> list[Any]:
  """Types of shared memory, of tensor memory, and of barriers."""
  (_, _, _, _, _, H, Hv), t, dtype = p.dims, p.tile, p.arrays["q"].dtype
  tmem, shared = tcgen05.memory(p, {"s": t.streamed, "o": Hv}, ("p",))
  shapes = stream.shapes(p, {"q": H}, {"k": H, "v": Hv})
  found = {name: stream.buffer(shape, dtype) for name, shape in shapes.items()}
  found |= {"lse": plgpu.SMEM((t.groups, LANES), jnp.float32), **shared}
  # The output takes the place of the queries where there is no room for both.
  both = found | {"o": stream.buffer((t.groups, LANES, Hv), dtype)}
  rest = [
    tcgen05.barriers(p, (1, 1)),
    plgpu.Barrier(num_barriers=t.groups),
    [tcgen05.done(p), tcgen05.done(p)],
  ]
  if Hv != H or stream.room([both, *rest], REDUCTION_BYTES):
    found = both
  stream.check(p, [found, *rest], REDUCTION_BYTES)
  return [found, tmem, *rest]


def _kernel(p, refs, o_ref, lse_ref, smem, tmem, pipe, q_ready, done):
  def copy(line, b, h):
    stream.produce(line, *pipe, stream.of_keys(p, refs, smem, b, h))

  schedule.run(
    p,
    refs,
    apart="o" in smem,
    copy=copy,
    fetch=stream.fetch(refs, smem, q_ready, ("q",)),
    compute=functools.partial(
      _compute, p, refs, smem, tmem, (pipe, q_ready, done)
    ),
    store=functools.partial(_store, p, (o_ref, lse_ref), smem, tmem),
    drain=functools.partial(stream.drain, p, pipe[1]),
  )


def _compute(p, refs, smem, tmem, barriers, line, place):
  """(m, l) of a line, whose sums are in tensor memory."""
  (b, h, start, group, size), (pipe, q_ready, done) = place, barriers
  x = tile.View(p, refs, None, b, h)
  bounds = tile.of_queries(x, start, size)
  plgpu.barrier_wait(q_ready.at[group])
  scores = functools.partial(_scores, smem, tmem, pipe, done, line, group)
  pl.when(line.steps > 0)(lambda: scores(0))
  step = functools.partial(
    _step, x, group, smem, tmem, pipe, done, scores, line, bounds, start
  )
  found = stream.consume(line, step, tile.nothing(x))
  o = tmem["o"].at[group]
  pl.when(line.steps > 0)(lambda: plgpu.barrier_wait(done[1].at[group]))
  pl.when(line.steps == 0)(lambda: tcgen05.clear(p, o))
  return found


def _scores(smem, tmem, pipe, done, line, group, n):
  """Starts the product of the queries and the keys of step n."""
  (k_full, _), (k_free, _) = pipe
  slot = stream.slots(line, n)[0]
  plgpu.barrier_wait(k_full.at[slot])
  tcgen05.meet()
  keys = smem["k"].at[slot].transpose((1, 0))
  tcgen05.multiply(tmem["s"].at[group], smem["q"].at[group], keys)
  tcgen05.report(k_free.at[slot], done[0].at[group])


def _step(x, group, smem, tmem, pipe, done, scores, line, bounds, start, n,
          where, slots, carry, masked):  # fmt: skip
  """Softmax of one tile, and the start of the product with its values."""
  p, ((_, v_full), (_, v_free)) = x.p, pipe
  (s_done, o_done), slot = done, slots[1]
  o = tmem["o"].at[group]
  plgpu.barrier_wait(s_done.at[group])
  s = tcgen05.load(tile.layout(p), tmem["s"].at[group])
  pl.when(n + 1 < line.steps)(lambda: scores(n + 1))
  seen, k = None, 0
  if masked or p.spec.dropout_rate:
    k = where()[1] * p.tile.streamed
  if masked:
    seen = tile.visible(x, bounds, tile.of_keys(x, k, p.tile.streamed), k)
  alpha, m, l, e = tile.softmax(
    p, s, seen, (None, *carry), scale=lambda _, alpha: alpha
  )
  if p.spec.dropout_rate:
    # Its hashes would be registers beside the scores.
    b, h, start, k, e = lax.optimization_barrier((x.b, x.h, start, k, e))
    kept = tile.keeper(x._replace(b=b, h=h), start, k)
    e = tile.dropped(p, e, kept())
  # Rounded and summed first: half of their registers are free for the sums.
  e = e.astype(smem["v"].dtype)
  alpha, m, l, e = lax.optimization_barrier((alpha, m, l, e))

  shared = "p" in smem

  @pl.when(n > 0)
  def _scale():
    plgpu.barrier_wait(o_done.at[group])
    tcgen05.scale(p, o, alpha)
    if shared:  # Else the operand's commit is that of the sums, too.
      plgpu.commit_tmem()

  left = (smem if shared else tmem)["p"].at[group]
  # Before all threads meet, as `tcgen05.meet` has them.
  plgpu.barrier_wait(v_full.at[slot])
  tcgen05.put(left, e, shared)
  tcgen05.multiply(o, left, smem["v"].at[slot], n > 0)
  tcgen05.report(v_free.at[slot], o_done.at[group])
  return m, l


def _store(p, outputs, smem, tmem, found, at):
  """Results to memory."""
  o_ref, lse_ref = outputs
  lse_smem = smem["lse"].at[at.group]
  factor, lse = tile.normalised(None, *found, scale=lambda _, factor: factor)
  # By way of shared memory to the threads that have the rows of the sum.
  lse_smem[...] = factor
  plgpu.commit_smem()
  factor = plgpu.load(lse_smem, layout=tcgen05.LAYOUT.reduce(1))
  plgpu.commit_smem()
  lse_smem[...] = lse
  tcgen05.drain(
    tmem["o"].at[at.group],
    smem.get("o", smem["q"]).at[at.group],
    o_ref.at[at.b, at.rows, at.h],
    lambda part: tile.scaled(part, factor),
  )
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[at.b, at.h, at.rows])
