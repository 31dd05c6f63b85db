"""The backward kernels for Blackwell: `tcgen05` and tensor memory.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for a B200.

`dq` and `dkv` share out the work as Hopper's do: 7 matmuls a tile, no atomics,
so that results repeat to the bit. Sums stay in tensor memory; dS and, of
transposed scores, P^T go there as left operands where there is room, else to
shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu import persistent as schedule
from kernels_pallas.flash_attention.gpu import sm100_tcgen05 as tcgen05
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.gpu_problem import Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import LANES
from kernels_pallas.flash_attention.gpu.sm90_backward import LSE, SHIFT
from kernels_pallas.flash_attention.tpu.tpu_problem import varying


class Done(NamedTuple):
  """Barriers, one a warpgroup, that say matmuls are done: scores (S and dP) of
  the next step, sums (dq, or dk and dv) of this one."""

  scores: Any
  sums: Any


def dq(p: Problem, interpret: Any) -> jax.Array:
  """As `sm90_backward.dq`.

  Args:
    p: The problem, keys streamed, with arrays do and stats.
    interpret: As of `plgpu.kernel`.
  """
  (B, N, _, T, _, H, _), q = p.dims, p.arrays["q"]
  kernel, scratch = functools.partial(_dq_kernel, p), _dq_scratch(p)
  out = [varying(q, (B, T, N, H), p.spec.output or q.dtype)]
  return schedule.call(p, kernel, scratch, out, 3, interpret, "dq_tcgen05")[0]


def dkv(
  p: Problem, names: tuple[str, ...], interpret: Any
) -> dict[str, jax.Array]:
  """As `sm90_backward.dkv`.

  Args:
    p: The problem, queries streamed, with arrays do and stats.
    names: Of 'dk' and 'dv'.
    interpret: As of `plgpu.kernel`.
  """
  (B, _, K, _, S, H, Hv), q = p.dims, p.arrays["q"]
  sizes, dtype = {"dk": H, "dv": Hv}, p.spec.output or q.dtype
  kernel = functools.partial(_dkv_kernel, p, names)
  scratch = _dkv_scratch(p, names)
  out = [varying(q, (B, S, K, sizes[name]), dtype) for name in names]
  matmuls = 1 + ("dk" in names) + len(names)
  name = "".join(names) + "_tcgen05"
  found = schedule.call(p, kernel, scratch, out, matmuls, interpret, name)
  return dict(zip(names, found, strict=True))


def _dq_scratch(p) -> list[Any]:
  """As `_scratch`."""
  (H, Hv), t = p.dims[-2:], p.tile
  shapes = stream.shapes(p, {"q": H, "do": Hv}, {"k": H, "v": Hv})
  sums = {"s": t.streamed, "dp": t.streamed, "dq": H}
  return _scratch(p, shapes, {"dq": H}, {}, (sums, ("ds",)), {"copies": (1, 1)})


def _dkv_scratch(p, names) -> list[Any]:
  """As `_scratch`."""
  (H, Hv), t = p.dims[-2:], p.tile
  shapes = stream.shapes(p, {"k": H, "v": Hv}, {"q": H, "do": Hv})
  sizes = {name: {"dk": H, "dv": Hv}[name] for name in names}
  products = ("s", "dp") if "dk" in names else ("s",)
  lefts = tuple({"dk": "ds", "dv": "p"}[name] for name in names)
  memory = dict.fromkeys(products, t.streamed) | sizes, lefts
  more = {"stats": plgpu.SMEM((t.stages[0], 2, t.streamed), jnp.float32)}
  # The statistics come with the queries, and threads read them.
  pipe = {"copies": (2, 1), "reports": (2, 1)}
  return _scratch(p, shapes, sizes, more, memory, pipe)


def _scratch(p, shapes, results, more, memory, pipe) -> list[Any]:
  """Types of shared memory, of tensor memory, and of barriers.

  Results take the place of what stays where they must. `memory` and `pipe` are
  what `tcgen05.memory` and `tcgen05.barriers` are called with.
  """
  tmem, shared = tcgen05.memory(p, *memory)
  sizes = {name: (p.tile.groups, LANES, n) for name, n in results.items()}

  def buffers(shapes):
    dtype = p.arrays["q"].dtype
    found = {name: stream.buffer(x, dtype) for name, x in shapes.items()}
    return found | more | shared

  rest = [
    tcgen05.barriers(p, **pipe),
    plgpu.Barrier(num_arrivals=2, num_barriers=p.tile.groups),
    Done(tcgen05.done(p), tcgen05.done(p)),
  ]
  both = buffers(shapes | sizes)
  smem = both if stream.room([both, *rest]) else buffers(shapes)
  stream.check(p, [smem, *rest])
  return [smem, tmem, *rest]


def _dq_kernel(p, refs, dq_ref, smem, tmem, pipe, ready, done):
  def copy(line, b, h):
    stream.produce(line, *pipe, stream.of_keys(p, refs, smem, b, h))

  def compute(line, at):
    x = tile.View(p, refs, None, at.b, at.h)
    kind = tile.layout(p).reduce(1)
    stats = [
      plgpu.load(
        refs["stats"].at[at.b, at.h, n, at.rows], layout=kind, optimized=False
      )
      for n in (LSE, SHIFT)
    ]
    bounds = tile.of_queries(x, at.start, at.size)
    plgpu.barrier_wait(ready.at[at.group])
    scores = functools.partial(_dq_scores, smem, tmem, pipe, done, line, at)
    pl.when(line.steps > 0)(lambda: scores(0))
    step = functools.partial(
      _dq_step, x, at, smem, tmem, pipe, done, scores, line, stats, bounds
    )
    stream.consume(line, step, None)
    _finish(p, line, done.sums.at[at.group], tmem["dq"].at[at.group])

  def store(_, at):
    tcgen05.drain(
      tmem["dq"].at[at.group],
      smem.get("dq", smem["q"]).at[at.group],
      dq_ref.at[at.b, at.rows, at.h],
      lambda part: part * p.spec.scale,
    )

  schedule.run(
    p, refs, "dq" in smem, copy, stream.fetch(refs, smem, ready, ("q", "do")),
    compute, store, functools.partial(stream.drain, p, pipe[1]),
  )  # fmt: skip


def _dq_scores(smem, tmem, pipe, done, line, at, n):
  """Starts the products of step n, S and dP."""
  ((k_full, v_full), (_, v_free)), group = pipe, at.group
  k_slot, v_slot = stream.slots(line, n)
  plgpu.barrier_wait(k_full.at[k_slot])
  plgpu.barrier_wait(v_full.at[v_slot])
  tcgen05.meet()
  for acc, left, right in (
    ("s", "q", smem["k"].at[k_slot]),
    ("dp", "do", smem["v"].at[v_slot]),
  ):
    tcgen05.multiply(
      tmem[acc].at[group], smem[left].at[group], right.transpose((1, 0))
    )
  tcgen05.report(v_free.at[v_slot], done.scores.at[group])


def _dq_step(x, at, smem, tmem, pipe, done, scores, line, stats, bounds, n,
             where, slots, _, masked):  # fmt: skip
  """dq += dS K of one tile."""
  p, group, k_slot = x.p, at.group, slots[0]
  first, seen = 0, None
  if masked or p.spec.dropout_rate:
    first = where()[1] * p.tile.streamed
  if masked:

    def seen():
      columns = tile.of_keys(x, first, p.tile.streamed)
      return tile.visible(x, bounds, columns, first)

  kept = tile.keeper(x, at.start, first)
  plgpu.barrier_wait(done.scores.at[group])
  s = tcgen05.load(tile.layout(p), tmem["s"].at[group])
  _, weight = tile.probabilities(x, s, stats[LSE], seen, kept)
  weight = lax.optimization_barrier(weight)
  dp = tcgen05.load(tile.layout(p), tmem["dp"].at[group])
  pl.when(n + 1 < line.steps)(lambda: scores(n + 1))
  ds = tile.slopes(x, weight, dp, stats[SHIFT], kept is not None)
  pl.when(n > 0)(lambda: plgpu.barrier_wait(done.sums.at[group]))
  _add(smem, tmem, group, n, "dq", ("ds", ds), smem["k"].at[k_slot])
  tcgen05.report(pipe[1][0].at[k_slot], done.sums.at[group])


def _dkv_kernel(p, names, refs, *rest):
  outputs = dict(zip(names, rest, strict=False))
  smem, tmem, pipe, ready, done = rest[len(names) :]

  def copy(line, b, h):
    stream.produce(line, *pipe, stream.of_queries(p, refs, smem, b, h))

  def compute(line, at):
    x = tile.View(p, refs, None, at.b, at.h)
    columns = tile.of_keys(x, at.start, at.size)
    plgpu.barrier_wait(ready.at[at.group])
    scores = functools.partial(
      _dkv_scores, names, smem, tmem, pipe, done, line, at
    )
    pl.when(line.steps > 0)(lambda: scores(0))
    step = functools.partial(
      _dkv_step, x, names, at, smem, tmem, pipe, done, scores, line, columns
    )
    stream.consume(line, step, None)
    sums = (tmem[name].at[at.group] for name in names)
    _finish(p, line, done.sums.at[at.group], *sums)

  def store(_, at):
    for name in names:
      factor = p.spec.scale if name == "dk" else 1
      tcgen05.drain(
        tmem[name].at[at.group],
        smem.get(name, smem[name[1]]).at[at.group],
        outputs[name].at[at.b, at.rows, at.h],
        lambda part, factor=factor: part * factor,
      )

  schedule.run(
    p, refs, names[0] in smem, copy,
    stream.fetch(refs, smem, ready, ("k", "v")), compute, store,
    functools.partial(stream.drain, p, pipe[1]),
  )  # fmt: skip


def _dkv_scores(names, smem, tmem, pipe, done, line, at, n):
  """Starts the products of step n, S^T and, for dk, dP^T."""
  ((q_full, do_full), (_, do_free)), group = pipe, at.group
  q_slot, do_slot = stream.slots(line, n)
  plgpu.barrier_wait(q_full.at[q_slot])
  if "dk" in names:
    plgpu.barrier_wait(do_full.at[do_slot])
  tcgen05.meet()
  queries = smem["q"].at[q_slot].transpose((1, 0))
  tcgen05.multiply(tmem["s"].at[group], smem["k"].at[group], queries)
  ended = [done.scores.at[group]]
  if "dk" in names:
    do = smem["do"].at[do_slot].transpose((1, 0))
    tcgen05.multiply(tmem["dp"].at[group], smem["v"].at[group], do)
    ended += [] if "dv" in names else [do_free.at[do_slot]]
  tcgen05.report(*ended)


def _dkv_step(x, names, at, smem, tmem, pipe, done, scores, line, columns, n,
              where, slots, _, masked):  # fmt: skip
  """dk += dS^T Q and dv += P^T dO of one tile, of those named."""
  p, group = x.p, at.group
  ((_, do_full), (q_free, do_free)), (q_slot, do_slot) = pipe, slots
  x, seen, kept = tile.of_passing_queries(x, where, masked, columns, at.start)

  def stats(row):
    kind = tile.layout(p).reduce(0)
    return plgpu.load(smem["stats"].at[q_slot, row], layout=kind)

  plgpu.barrier_wait(done.scores.at[group])
  s = tcgen05.load(tile.layout(p), tmem["s"].at[group])
  e, weight = tile.probabilities(x, s, stats(LSE), seen, kept)
  pl.when(n > 0)(lambda: plgpu.barrier_wait(done.sums.at[group]))
  if "dk" not in names:
    plgpu.barrier_wait(do_full.at[do_slot])
  if "dv" in names:
    _add(smem, tmem, group, n, "dv", ("p", e), smem["do"].at[do_slot])
  if "dk" in names:
    weight = lax.optimization_barrier(weight)
    dp = tcgen05.load(tile.layout(p), tmem["dp"].at[group])
  pl.when(n + 1 < line.steps)(lambda: scores(n + 1))
  if "dk" in names:
    ds = tile.slopes(x, weight, dp, stats(SHIFT), kept is not None)
    _add(smem, tmem, group, n, "dk", ("ds", ds), smem["q"].at[q_slot])
  # The statistics were read for the last time, before a copy overwrites them.
  plgpu.commit_smem()
  plgpu.barrier_arrive(q_free.at[q_slot])
  ended = [do_free.at[do_slot]] if "dv" in names else []
  tcgen05.report(q_free.at[q_slot], *ended, done.sums.at[group])


def _add(smem, tmem, group, n, acc, left, right) -> None:
  """Starts acc += left right; left is its operand's name, and its value."""
  name, value = left
  operand = (smem if name in smem else tmem)[name].at[group]
  tcgen05.put(operand, value.astype(right.dtype), name in smem)
  tcgen05.multiply(tmem[acc].at[group], operand, right, n > 0)


def _finish(p, line, done, *sums) -> None:
  """Waits for the last matmuls; no tile leaves zeros."""
  pl.when(line.steps > 0)(lambda: plgpu.barrier_wait(done))
  pl.when(line.steps == 0)(lambda: tcgen05.clear(p, *sums))
