"""Decode attention kernel for Ampere and later GPUs: `mma` and `cp.async`.

Not yet run on a GPU: the interpreter checks numbers and races, ptxas for A100,
H100 and B200 registers and spills; an emulator runs its PTX
(`tests/kernels_pallas/ptx_emulator.py`).

Decoding is bound by reading keys and values, and a tensor core processes 16
rows of queries for the price of one, so one instruction serves them all. A
block is one warpgroup: the queries of a key head, and one run of its keys. Its
four warps are independent: with at most 16 rows of queries, each processes a
quarter of every tile of keys, with its own maximum, sum and output, which are
combined when the run ends (`parts` = 4). So every key and value is read from
shared memory once, and the loop only waits for tiles to arrive. With more rows
the warps share the rows, too (2 and 1 parts).

Of a warpgroup's 64 rows, warp w has 16: the queries from 16 (w // parts) on,
against part w % parts of a tile. What a row sees is a range of the part's
columns, given in `bounds`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.decode_attention.gpu import sm80_matmuls
from kernels_pallas.decode_attention.gpu.sm80_matmuls import ROWS, WARP
from kernels_pallas.flash_attention.gpu import sm80_mma as mma
from kernels_pallas.flash_attention.gpu import tile
from kernels_pallas.flash_attention.tpu.problem import varying

CHUNK = 32
"""Columns of the output that parts exchange at a time."""

FIELDS = ("row", "begin", "end")
"""Fields of an entry: its row, and its range of keys."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """The kernel's static facts and arrays.

  Attributes:
    spec: Static part of the call.
    dims: (entries, items, K, blocks of queries, H, Hv).
    parts: Parts that the warps divide a tile into.
    keys: Keys per tile.
    stages: Tiles in shared memory.
    source: How tokens map to lines of k and v.
    columns: (factor, offset) from a key head to its first column of k and of v.
    arrays: q `[items * K * rows, H]`, k and v `[lines, columns]`, table, work
      `[entries * 3]`, bounds `[entries, blocks, 2, 64]`; for quantized pages
      scales, as in `copy.fetch_scales`.
    interpreted: Whether the kernel is interpreted.
  """

  spec: Any
  dims: tuple[int, ...]
  parts: int
  keys: int
  stages: int
  source: copy.Source
  columns: tuple[tuple[int, int], tuple[int, int]]
  arrays: dict[str, Any]
  interpreted: bool = False

  @property
  def rows(self) -> int:
    """Rows of queries per block."""
    return ROWS // self.parts

  @property
  def code(self) -> Any:
    """The dtype of quantized pages, or None."""
    return self.arrays["k"].dtype if "scales" in self.arrays else None

  @property
  def shared(self) -> int:
    """Bytes of shared memory, without alignment."""
    (H, Hv), size = self.dims[-2:], self.arrays["k"].dtype.itemsize
    exchange = 4 * ROWS * (CHUNK + 2) if self.parts > 1 else 0
    token = size * (H + Hv) + 8 * (self.code is not None)
    return 2 * self.rows * H + self.stages * self.keys * token + exchange

  @property
  def mine(self) -> int:
    """Keys of a tile that one warp processes."""
    return self.keys // self.parts


def run(p: Plan, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """Returns outputs [E, K, rows, Hv] and log-sum-exps [E, K, rows], in float32.

  Args:
    p: The plan.
    interpret: As in `plgpu.kernel`.
  """
  (E, _, K, blocks, H, Hv), q = p.dims, p.arrays["q"]
  buffers = {"q": copy.buffer((p.rows, H), q.dtype)}
  for name, n in (("k", H), ("v", Hv)):
    if p.code is None:
      buffers[name] = copy.buffer((p.stages, p.keys, n), q.dtype)
    elif p.interpreted:
      buffers[name] = plgpu.SMEM((p.stages, p.keys, n), p.code)
    else:
      pairs = p.stages, p.keys, n // 2
      buffers[name] = copy.buffer(pairs, jnp.int16)
  if p.code is not None:
    buffers["scales"] = plgpu.SMEM((p.stages, 2 * p.keys), jnp.float32)
  if p.parts > 1:
    buffers["stats"] = plgpu.SMEM((2, ROWS), jnp.float32)
    buffers["o"] = plgpu.SMEM((ROWS, CHUNK), jnp.float32)
  call = plgpu.kernel(
    functools.partial(_kernel, p, bool(interpret)),
    out_type=[
      varying(q, (E, K, blocks * p.rows, Hv), jnp.float32),
      varying(q, (E, K, blocks * p.rows), jnp.float32),
    ],
    scratch_types=[buffers],
    grid=(K, blocks, E),
    grid_names=("head", "block", "entry"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="decode_attention_mma",
    interpret=interpret,
  )
  return tuple(call(p.arrays))


def _kernel(p, interpreted, refs, o_ref, lse_ref, smem):
  head, block = lax.axis_index("head"), lax.axis_index("block")
  entry = lax.axis_index("entry")
  row, begin, end = (refs["work"][entry * len(FIELDS) + i] for i in range(3))
  first = lax.div(begin, jnp.int32(p.keys)) * p.keys
  steps = lax.div(end - first + (p.keys - 1), jnp.int32(p.keys))
  steps = jnp.where(end > begin, steps, 0)

  def fetch(n):
    slot = lax.rem(n, jnp.int32(p.stages))
    copies = [
      (refs[name], head * scale + shift, smem[name].at[slot])
      for name, (scale, shift) in zip("kv", p.columns, strict=True)
    ]
    where = row, head, first + n * p.keys, begin, end
    copy.fetch(interpreted, p.source, refs["table"], copies, where)
    if p.code is not None:
      copy.fetch_scales(
        interpreted, p.source, refs["table"], refs["scales"],
        smem["scales"].at[slot], where,
      )  # fmt: skip
    copy.commit(interpreted)

  _fetch_queries(p, interpreted, refs, smem["q"], (entry, head, block))
  for n in range(p.stages - 1):
    fetch(jnp.int32(n))
  low, high = (
    plgpu.load(
      refs["bounds"].at[entry, block, n],
      layout=plgpu.Layout.WGMMA.reduce(1),
      optimized=False,
    )
    for n in range(2)
  )
  part = copy.warp_part(interpreted, p.parts)

  def step(n, carry):
    copy.wait(interpreted, p.stages - 2)
    fetch(n + p.stages - 1)
    slot = lax.rem(n, jnp.int32(p.stages))
    k, v = (smem[name].at[slot] for name in "kv")
    s = sm80_matmuls.scores(p, interpreted, part, smem["q"], k)
    if p.code is not None:
      scales = smem["scales"].at[slot]
      s = s * sm80_matmuls.scales(p, interpreted, part, scales, 0)
    key = plgpu.broadcasted_iota(
      jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA
    )
    since = first + n * p.keys
    seen = key < tile.broadcast_vector(high - since, s.shape, 0)
    seen &= key >= tile.broadcast_vector(low - since, s.shape, 0)
    acc, m, l, e = _softmax(p.spec, s, seen, carry)
    if p.code is not None:
      e = e * sm80_matmuls.scales(p, interpreted, part, scales, p.keys)
    return sm80_matmuls.values(p, interpreted, part, acc, e, v), m, l

  start = tile.zeros(ROWS, p.dims[-1]), tile.vector(-jnp.inf), tile.vector(0.0)
  acc, m, l = lax.fori_loop(0, steps, step, start)
  copy.wait(interpreted, 0)
  queries = pl.ds(block * p.rows, p.rows)
  _finish(
    p, smem, (acc, m, l), o_ref.at[entry, head, queries],
    lse_ref.at[entry, head, queries], interpreted,
  )  # fmt: skip


def _fetch_queries(p, interpreted, refs, target, where):
  """Starts copying the block's queries."""
  entry, head, block = where
  _, items, K, blocks, _, _ = p.dims
  item = lax.rem(entry, jnp.int32(items))
  start = ((item * K + head) * blocks + block) * p.rows
  where = 0, 0, start, start, start + p.rows
  own, copies = copy.Source(p.rows, None, 1), [(refs["q"], 0, target)]
  copy.fetch(interpreted, own, refs["table"], copies, where)


def _softmax(spec, s, seen, carry):
  """One online softmax step: (acc, m, l, e), acc without the new tile."""
  acc, m, l = carry
  t = s * (spec.scale * tile.LOG2E)
  if spec.softcap is not None:
    # Hardware tanh has only 11 bits: too few for logits.
    root = lax.rsqrt(1 + jnp.exp2(t * (2 / spec.softcap)))
    t = (1 - 2 * root * root) * (spec.softcap * tile.LOG2E)
  t = jnp.where(seen, t, -jnp.inf)
  m_new = jnp.maximum(m, t.max(axis=1))
  # Before any visible key: a finite shift, so that exp gives 0, not NaN.
  shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  e = jnp.exp2(t - tile.broadcast_vector(shift, t.shape, 0))
  acc = acc * tile.broadcast_vector(alpha, acc.shape, 0)
  return acc, m_new, l * alpha + e.sum(axis=1), e


def _finish(p, smem, state, o_ref, lse_ref, interpreted):
  """Combines the parts, in chunks of columns, and stores the results."""
  acc, m, l = state
  if p.parts == 1:
    o, lse = tile.normalise(acc, m, l)
    mma.store(o, o_ref)
    mma.store(lse, lse_ref)
    return
  stats, exchange = smem["stats"], smem["o"]
  stats[0], stats[1] = m, l
  copy.sync_warpgroup(interpreted)
  groups = []
  for first in range(0, p.rows, WARP):
    rows = pl.ds(first, WARP)
    parts = [
      pl.ds(first * p.parts + n * WARP, WARP) for n in range(p.parts)
    ]  # fmt: skip
    lse, factors = _weights(stats, parts)
    mma.store(lse, lse_ref.at[rows])
    groups.append((rows, parts, factors))
  for at in range(0, acc.shape[1], CHUNK):
    exchange[...] = _columns(interpreted, acc, at)
    copy.sync_warpgroup(interpreted)
    for rows, parts, factors in groups:
      found = sum(
        _load(exchange.at[part])
        * tile.broadcast_vector(factor, (WARP, CHUNK), 0)
        for part, factor in zip(parts, factors, strict=True)
      )
      mma.store(found, o_ref.at[rows, pl.ds(at, CHUNK)])
    copy.sync_warpgroup(interpreted)


def _weights(stats, parts):
  """Returns log-sum-exps of 16 rows, and the weight of each part's output."""
  maxima = [_load(stats.at[0, part], 1) for part in parts]
  sums = [_load(stats.at[1, part], 1) for part in parts]
  most = functools.reduce(jnp.maximum, maxima)
  shift = jnp.where(most == -jnp.inf, 0.0, most)
  factors = [jnp.exp2(x - shift) for x in maxima]
  total = sum(f * x for f, x in zip(factors, sums, strict=True))
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  lse = shift * tile.LN2 + jnp.log(total)
  return jnp.where(empty, -jnp.inf, lse), [f / total for f in factors]


def _load(ref, reduced=None):
  """Loads 16 rows, or a vector of them, in all four warps alike."""
  layout = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=1)
  layout = layout if reduced is None else layout.reduce(reduced)
  return plgpu.load(ref, layout=layout, optimized=False)


def _columns(interpreted, acc, at):
  """Returns columns [at, at + CHUNK) of an accumulator."""
  if interpreted:
    return acc[:, at : at + CHUNK]
  layout = plgpu.Layout.WGMMA
  kind = plgpu.ShapeDtypeStruct((ROWS, CHUNK), acc.dtype, layout=layout)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=kind)
  def cut(_, values):
    return values[:, at : at + CHUNK]

  return cut(acc)
