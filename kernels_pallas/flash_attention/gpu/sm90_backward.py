"""Backward flash attention kernels for Hopper (sm90), with recomputation.

Not yet run on a GPU: the interpreter checks numbers and races, ptxas for an
H100 registers and spills.

`dq` keeps queries and streams keys, `dkv` keeps keys and streams the queries of
all heads of a group, whose gradients it sums in float32 (the formulas are in
kernels_pallas/MATH.md 3, 4): 7 matmuls a tile, no atomics, so that results are
bitwise reproducible. `dkv` uses transposed scores: P^T and dS^T are then left
operands, which `wgmma` reads from registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu import persistent as schedule
from kernels_pallas.flash_attention.gpu import sm90_wgmma as wgmma
from kernels_pallas.flash_attention.gpu import tile
from kernels_pallas.flash_attention.gpu import tile_stream as stream
from kernels_pallas.flash_attention.gpu.problem import Problem
from kernels_pallas.flash_attention.gpu.tile_sizes import ROWS
from kernels_pallas.flash_attention.tpu.problem import varying

LSE, SHIFT = 0, 1
"""Rows of `arrays['stats']`, float32 [B, N, 2, T]: the base-2 log-sum-exp (+inf
if there is none), and delta minus the cotangent of the log-sum-exp."""

EARLY = 4
"""Most mask rows, two registers each, that a warpgroup keeps over a loop."""


def dq(p: Problem, interpret: Any) -> jax.Array:
  """Returns dq [B, T, N, H] in the dtype of the output.

  Args:
    p: The problem, keys streamed, with arrays do and stats.
    interpret: As in `plgpu.kernel`.
  """
  (B, N, _, T, _, H, _), q = p.dims, p.arrays["q"]
  kernel = functools.partial(_dq_kernel, p)
  out = [varying(q, (B, T, N, H), p.spec.output or q.dtype)]
  return schedule.call(p, kernel, _dq_scratch(p), out, 3, interpret, "dq")[0]


def dkv(
  p: Problem, names: tuple[str, ...], interpret: Any
) -> dict[str, jax.Array]:
  """Returns dk [B, S, K, H] and dv [B, S, K, Hv], in the dtype of the output.

  Args:
    p: The problem, queries streamed, with arrays do and stats.
    names: Which of 'dk' and 'dv' to compute.
    interpret: As in `plgpu.kernel`.
  """
  (B, _, K, _, S, H, Hv), q = p.dims, p.arrays["q"]
  sizes = {"dk": H, "dv": Hv}
  dtype = p.spec.output or q.dtype
  out = [varying(q, (B, S, K, sizes[name]), dtype) for name in names]
  kernel = functools.partial(_dkv_kernel, p, names)
  matmuls = 2 * len(names) if len(names) > 1 else {"dk": 3, "dv": 2}[names[0]]
  scratch = _dkv_scratch(p, names)
  name = "".join(names)
  found = schedule.call(p, kernel, scratch, out, matmuls, interpret, name)
  return dict(zip(names, found, strict=True))


def _dq_scratch(p) -> list[Any]:
  """Types of shared memory: buffers, and barriers."""
  (H, Hv), t = p.dims[-2:], p.tile
  shapes = stream.buffer_shapes(p, {"q": H, "do": Hv}, {"k": H, "v": Hv})
  return _scratch(p, shapes, {"dq": (t.groups, ROWS, H)}, {}, (1, 1))


def _dkv_scratch(p, names) -> list[Any]:
  """Types of shared memory: buffers, and barriers."""
  (H, Hv), t = p.dims[-2:], p.tile
  shapes = stream.buffer_shapes(p, {"k": H, "v": Hv}, {"q": H, "do": Hv})
  sizes = {"dk": H, "dv": Hv}
  results = {name: (t.groups, ROWS, sizes[name]) for name in names}
  stats = plgpu.SMEM((t.stages[0], 2, t.streamed), jnp.float32)
  return _scratch(p, shapes, results, {"stats": stats}, (2, 1))


def _scratch(p, shapes, results, more, arrivals) -> list[Any]:
  """Results reuse the stationary operands' memory if there is no room."""
  if p.spec.blocks.operand == "shared":
    shapes |= {"p": (p.tile.groups, ROWS, p.tile.streamed)}

  def buffers(shapes):
    dtype = p.arrays["q"].dtype
    return {name: stream.buffer(x, dtype) for name, x in shapes.items()} | more

  barriers = [
    stream.barriers(p, arrivals),
    plgpu.Barrier(num_arrivals=2, num_barriers=p.tile.groups),
  ]
  both = [buffers(shapes | results), *barriers]
  found = both if stream.fits_shared(both) else [buffers(shapes), *barriers]
  stream.check(p, found)
  return found


def _dq_kernel(p, refs, dq_ref, smem, pipe, ready):
  def copy(line, b, h):
    stream.produce(line, *pipe, stream.key_copies(p, refs, smem, b, h))

  def compute(line, at):
    mine = _own_buffers(smem, ("q", "do"), at.group)
    x = tile.TileContext(p, refs, mine.get("p"), at.b, at.h)
    rows = [
      plgpu.load(
        refs["stats"].at[at.b, at.h, n, at.rows],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )
      for n in (LSE, SHIFT)
    ]
    stats = rows.__getitem__
    bounds = None
    if len(p.rows) <= EARLY:
      bounds = tile.load_query_mask(x, at.start, ROWS)
    plgpu.barrier_wait(ready.at[at.group])
    step = functools.partial(
      _dq_step, x, at.group, smem, pipe, stats, bounds, at.start
    )
    return stream.consume(line, step, tile.zeros(ROWS, p.dims[5]))

  def store(acc, at):
    buffer = smem.get("dq", smem["q"]).at[at.group]
    wgmma.store(buffer, acc * p.spec.scale, dq_ref.at[at.b, at.rows, at.h])

  schedule.run(
    p, refs, "dq" in smem, copy, stream.fetch(refs, smem, ready, ("q", "do")),
    compute, store,
  )  # fmt: skip


def _dq_step(x, group, smem, pipe, stats, bounds, start, _, where, slots, acc,
             masked):  # fmt: skip
  """Computes dq += dS K of one tile."""
  p, ((k_full, v_full), (k_free, v_free)) = x.p, pipe
  mine, (k_slot, v_slot) = _unhoisted_buffers(smem, ("q", "do"), group), slots
  k, v = smem["k"].at[k_slot], smem["v"].at[v_slot]
  first, seen = 0, None
  if masked or p.spec.dropout_rate:
    first = where()[1] * p.tile.streamed
  if masked:

    def seen():
      late = lax.optimization_barrier(start)
      rows = bounds or tile.load_query_mask(x, late, ROWS)
      columns = tile.load_key_mask(x, first, p.tile.streamed)
      return tile.visible(x, rows, columns, first)

  kept = tile.dropout_mask(x, start, first)
  plgpu.barrier_wait(k_full.at[k_slot])
  plgpu.barrier_wait(v_full.at[v_slot])
  ds = _scores(x, (mine["q"], k), (mine["do"], v), stats, seen, kept)
  plgpu.barrier_arrive(v_free.at[v_slot])
  acc = wgmma.accumulate(x, acc, ds, k)
  plgpu.barrier_arrive(k_free.at[k_slot])
  return acc


def _dkv_kernel(p, names, refs, *rest):
  outputs = dict(zip(names, rest, strict=False))
  smem, pipe, ready = rest[len(names) :]

  def copy(line, b, h):
    stream.produce(line, *pipe, stream.query_copies(p, refs, smem, b, h))

  def compute(line, at):
    mine = _own_buffers(smem, ("k", "v"), at.group)
    x = tile.TileContext(p, refs, mine.get("p"), at.b, at.h)
    columns = tile.load_key_mask(x, at.start, ROWS)
    plgpu.barrier_wait(ready.at[at.group])
    step = functools.partial(
      _dkv_step, x, at.group, smem, pipe, columns, at.start
    )
    sizes = {"dk": p.dims[5], "dv": p.dims[6]}
    return stream.consume(
      line, step, {name: tile.zeros(ROWS, sizes[name]) for name in names}
    )

  def store(acc, at):
    for name in names:
      value = acc[name] * p.spec.scale if name == "dk" else acc[name]
      buffer = smem.get(name, smem[name[1]]).at[at.group]
      wgmma.store(buffer, value, outputs[name].at[at.b, at.rows, at.h])

  schedule.run(
    p, refs, names[0] in smem, copy,
    stream.fetch(refs, smem, ready, ("k", "v")), compute, store,
  )  # fmt: skip


def _dkv_step(x, group, smem, pipe, columns, start, _, where, slots, acc,
              masked):  # fmt: skip
  """Computes dk += dS^T Q and dv += P^T dO of one tile, those in `acc`."""
  (q_full, do_full), (q_free, do_free) = pipe
  mine, (q_slot, do_slot) = _unhoisted_buffers(smem, ("k", "v"), group), slots
  q, do = smem["q"].at[q_slot], smem["do"].at[do_slot]
  x, seen, kept = tile.streamed_query_masks(x, where, masked, columns, start)

  def stats(n):
    row = smem["stats"].at[q_slot, n]
    return plgpu.load(row, layout=plgpu.Layout.WGMMA.reduce(0))

  found = {}

  def values(e):
    if "dv" in acc:
      found["dv"] = wgmma.accumulate(x, acc["dv"], e, do)

  plgpu.barrier_wait(q_full.at[q_slot])
  plgpu.barrier_wait(do_full.at[do_slot])
  right = (mine["v"], do) if "dk" in acc else None
  ds = _scores(x, (mine["k"], q), right, stats, seen, kept, values)
  plgpu.barrier_arrive(do_free.at[do_slot])
  if "dk" in acc:
    found["dk"] = wgmma.accumulate(x, acc["dk"], ds, q)
  plgpu.barrier_arrive(q_free.at[q_slot])
  return found


def _scores(x, left, right, stats, seen, kept, values=lambda e: None):
  """Returns dS of a tile, or None; transposed if queries are streamed.

  `stats(n)` loads a row of the statistics, `seen()` the mask, if any, and
  `kept()` the dropout mask, all late, since registers are scarce. `values(e)`
  consumes the probabilities as soon as they are final.
  """
  p = x.p

  def probabilities(s):
    return tile.probabilities(x, s, stats(LSE), seen, kept)

  def gradient(weight, dp):
    signed = kept is not None
    return tile.logit_gradients(x, weight, dp, stats(SHIFT), signed)

  if right is None or p.tile.products == "one":
    e, weight = probabilities(wgmma.product(*left))
    values(e)
    if right is None:
      return None
    return gradient(weight, wgmma.product(*right))

  def run(s_out, dp_out):
    plgpu.wgmma(s_out, left[0], left[1].transpose((1, 0)))
    plgpu.wgmma(dp_out, right[0], right[1].transpose((1, 0)))
    s = plgpu.wgmma_accumulator_load(s_out, wait_n=1)
    e, weight = probabilities(s)
    return e, gradient(weight, dp_out[...])

  acc = plgpu.ACC(tile.shape(p), jnp.float32)
  e, ds = pl.run_scoped(run, acc, acc)
  values(e)
  return ds


def _own_buffers(smem, names, group) -> dict[str, Any]:
  """Returns a warpgroup's own buffers in shared memory."""
  return {name: smem[name].at[group] for name in (*names, "p") if name in smem}


def _unhoisted_buffers(smem, names, group) -> dict[str, Any]:
  """As `_own_buffers`, with addresses hidden from loop-invariant code motion.

  The compiler would keep all 16 addresses of a wide head and spill
  accumulators.
  """
  return _own_buffers(smem, names, lax.optimization_barrier(group))
