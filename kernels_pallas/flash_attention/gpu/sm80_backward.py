"""The backward kernels for GPUs before Hopper: `mma` and `cp.async`.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for an A100.

As `mosaic_gpu_backward`: `dq` holds queries and streams keys, `dkv` holds keys
and streams the queries of all heads of a group, on transposed scores, so that
P and dS become left operands in the registers where they are. The gradient of
the probabilities comes first: what it streams (values, or cotangents) then has
the rest of a step to arrive for the next one, and what the scores stream
arrives during it.
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
from kernels_pallas.flash_attention.gpu.gpu_problem import Problem
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import ROWS
from kernels_pallas.flash_attention.gpu.sm90_backward import LSE, SHIFT
from kernels_pallas.flash_attention.tpu.tpu_problem import varying


def dq(p: Problem, interpret: Any) -> jax.Array:
  """dq [B, T, N, H] in the type of the output.

  Args:
    p: The problem, keys streamed, with one group and arrays do and stats.
    interpret: As of `plgpu.kernel`.
  """
  (B, N, _, T, _, H, Hv), q = p.dims, p.arrays["q"]
  sizes = {"q": (ROWS, H), "do": (ROWS, Hv), "k": (p.tile.streamed, H),
           "v": (p.tile.streamed, Hv)}  # fmt: skip
  out = [varying(q, (B, T, N, H), p.spec.output or q.dtype)]
  return _call(p, _dq_kernel, sizes, out, N, 3, interpret, "dq")[0]


def dkv(
  p: Problem, names: tuple[str, ...], interpret: Any
) -> dict[str, jax.Array]:
  """dk [B, S, K, H] and dv [B, S, K, Hv], those named, in the type of the
  output.

  Args:
    p: The problem, queries streamed, with one group and arrays do and stats.
    names: Of 'dk' and 'dv'.
    interpret: As of `plgpu.kernel`.
  """
  (B, _, K, _, S, H, Hv), q = p.dims, p.arrays["q"]
  sizes = {"k": (ROWS, H), "v": (ROWS, Hv), "q": (p.tile.streamed, H),
           "do": (p.tile.streamed, Hv)}  # fmt: skip
  if "dk" not in names:
    del sizes["v"]
  dims, dtype = {"dk": H, "dv": Hv}, p.spec.output or q.dtype
  out = [varying(q, (B, S, K, dims[name]), dtype) for name in names]
  kernel = functools.partial(_dkv_kernel, names)
  matmuls = 2 * len(names) if len(names) > 1 else {"dk": 3, "dv": 2}[names[0]]
  found = _call(p, kernel, sizes, out, K, matmuls, interpret, "".join(names))
  return dict(zip(names, found, strict=True))


def _call(p, kernel, sizes, out, heads, matmuls, interpret, name):
  dtype = p.arrays["q"].dtype
  buffers = {
    name: stream.buffer((1, *size), dtype) for name, size in sizes.items()
  }
  if p.spec.blocks.operand == "shared":
    buffers["p"] = stream.buffer((ROWS, p.tile.streamed), dtype)
  return plgpu.kernel(
    functools.partial(kernel, p, bool(interpret)),
    out_type=out,
    scratch_types=[buffers],
    grid=(heads, p.lines, p.dims[0]),
    grid_names=("head", "line", "batch"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=f"flash_attention_{name}_mma",
    interpret=interpret,
    **stream.estimate(p, matmuls),
  )(mma.flat(p, ("q", "k", "v", "do")))


def _dq_kernel(p, interpreted, refs, dq_ref, smem):
  b, h = lax.axis_index("batch"), lax.axis_index("head")
  row = p.lines - 1 - lax.axis_index("line")
  line = stream.line(p, refs["table"], b, row)
  start = row * p.tile.rows
  queries = pl.ds(start, ROWS)
  kv = h if p.group == 1 else lax.div(h, jnp.int32(p.group))

  def fetch(name, n):
    batch, head = b, kv
    if mma.scarce(p):
      batch, head = lax.optimization_barrier((b, kv))
    where = batch, line.nth(_last(line, n)) * p.tile.streamed, head
    mma.fetch(interpreted, refs[name], smem[name], where)

  for name in ("q", "do"):
    mma.fetch(interpreted, refs[name], smem[name], (b, start, h))

  @pl.when(line.steps > 0)
  def _first():
    fetch("v", 0)
    fetch("k", 0)

  x = tile.View(p, refs, smem.get("p"), b, h)
  step = functools.partial(_dq_step, x, interpreted, smem, fetch, line, start)
  acc = stream.consume(line, step, tile.zeros(ROWS, p.dims[5]))
  mma.wait(interpreted, 0)
  mma.store(acc * p.spec.scale, dq_ref.at[b, queries, h])


def _dq_step(x, interpreted, smem, fetch, line, start, n, _, slots, acc,
             masked):  # fmt: skip
  """dq += dS K of one tile.

  What belongs to queries is read again in every step: kept, it would spill.
  """
  del slots
  p = x.p
  q, do, k, v = mma.again(smem, ("q", "do", "k", "v"))
  mma.wait(interpreted, 1)
  dp = mma.product(interpreted, do, v)
  fetch("v", n + 1)
  late, first, seen = lax.optimization_barrier(start), 0, None
  if masked or p.spec.dropout_rate:
    first = line.nth(n) * p.tile.streamed
  if kept := tile.keeper(x, late, first):
    dp = tile.dropped(p, dp, kept())
  mma.wait(interpreted, 1)
  s = mma.product(interpreted, q, k)
  if masked:

    def seen():
      bounds = tile.of_queries(x, late, ROWS)
      columns = tile.of_keys(x, first, p.tile.streamed)
      return tile.visible(x, bounds, columns, first)

  stats = functools.partial(_stats, x, queries=pl.ds(late, ROWS))
  _, weight = tile.probabilities(x, s, stats(LSE), seen)
  ds = tile.slopes(x, weight, dp, stats(SHIFT))
  acc = mma.accumulate(interpreted, x, acc, ds, k)
  fetch("k", n + 1)
  return acc


def _dkv_kernel(names, p, interpreted, refs, *rest):
  outputs, smem = dict(zip(names, rest, strict=False)), rest[-1]
  b, h = lax.axis_index("batch"), lax.axis_index("head")
  row = lax.axis_index("line")
  line = stream.line(p, refs["table"], b, row, p.group)
  start = row * p.tile.rows
  keys = pl.ds(start, ROWS)

  def fetch(name, n):
    head, i = line.at(_last(line, n))
    where = b, i * p.tile.streamed, h * p.group + head
    mma.fetch(interpreted, refs[name], smem[name], where)

  for name in ("k", "v"):
    if name in smem:
      mma.fetch(interpreted, refs[name], smem[name], (b, start, h))

  @pl.when(line.steps > 0)
  def _first():
    fetch("do", 0)
    fetch("q", 0)

  x = tile.View(p, refs, smem.get("p"), b, h)
  step = functools.partial(_dkv_step, x, interpreted, smem, fetch, line, start)
  sizes = {"dk": p.dims[5], "dv": p.dims[6]}
  acc = stream.consume(
    line, step, {name: tile.zeros(ROWS, sizes[name]) for name in names}
  )
  mma.wait(interpreted, 0)
  for name in names:
    value = acc[name] * p.spec.scale if name == "dk" else acc[name]
    mma.store(value, outputs[name].at[b, keys, h])


def _dkv_step(x, interpreted, smem, fetch, line, start, n, where, _, acc,
              masked):  # fmt: skip
  """dk += dS^T Q and dv += P^T dO of one tile, of those in `acc`."""
  p = x.p
  if mma.scarce(p):
    x = mma.late(x)
  k, q, do = mma.again(smem, ("k", "q", "do"))
  head, i = where()
  first, x = i * p.tile.streamed, x._replace(h=x.h * p.group + head)
  seen = None
  if masked:

    def seen():
      bounds = tile.of_queries(x, first, p.tile.streamed)
      columns = tile.of_keys(x, lax.optimization_barrier(start), ROWS)
      return tile.visible(x, bounds, columns, start)

  kept = tile.keeper(x, first, start)
  mma.wait(interpreted, 1)
  if "dk" in acc:
    dp = mma.product(interpreted, mma.again(smem, "v")[0], do)
  if "dv" not in acc:
    fetch("do", n + 1)
    if kept:
      # Before there are scores: registers are what there is least of.
      dp, kept = tile.dropped(p, dp, kept()), None
  mma.wait(interpreted, 0 if "dv" in acc else 1)
  s = mma.product(interpreted, k, q)
  stats = functools.partial(_stats, x, queries=pl.ds(first, p.tile.streamed))
  e, weight = tile.probabilities(x, s, stats(LSE), seen, kept)
  found = {}
  if "dv" in acc:
    found["dv"] = mma.accumulate(interpreted, x, acc["dv"], e, do)
    fetch("do", n + 1)
  if "dk" in acc:
    ds = tile.slopes(x, weight, dp, stats(SHIFT), signed=kept is not None)
    found["dk"] = mma.accumulate(interpreted, x, acc["dk"], ds, q)
  fetch("q", n + 1)
  return found


def _last(line: stream.Line, n: Any) -> Any:
  """Step n, or the last one for what follows it: copies have no condition, and
  as many must be under way in every step."""
  return jnp.minimum(n, line.steps - 1)


def _stats(x: tile.View, n: int, queries: Any) -> jax.Array:
  """A row of the statistics of queries, out of memory."""
  return plgpu.load(
    x.refs["stats"].at[x.b, x.h, n, queries],
    layout=plgpu.Layout.WGMMA.reduce(1 - x.along),
    optimized=False,
  )
