"""The decoding kernel for GPUs from Ampere on: `mma` and `cp.async`.

It has run on no GPU yet: numbers and races are the interpreter's, registers
and spills those of ptxas for A100, H100 and B200; its PTX runs in an emulator
(`tests/kernels_pallas/ptx_emulator.py`).

Decoding is bound by the bytes of keys and values, of which a tensor core makes
16 rows of queries for nothing; so one instruction serves them all. A block is
one warpgroup: the queries of a key head, and one run of its keys. Its four
warps share no work: where there are at most 16 rows of queries, each of them
meets a quarter of every tile of keys, with a maximum, a sum and an output of
its own, which are combined when the run ends (`parts` = 4). So every key and
value is read from shared memory once, and nothing but the arrival of a tile is
awaited in the loop. With more rows the warps share them, too (2 and 1 parts).

Of a warpgroup's 64 rows, warp w has 16: those of queries from 16 (w // parts)
on, against part w % parts of a tile. What a row sees is a range of the part's
columns, which stands in `bounds`.
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
from kernels_pallas.decode_attention.gpu import mosaic_gpu_products as products
from kernels_pallas.decode_attention.gpu.mosaic_gpu_products import ROWS, WARP
from kernels_pallas.flash_attention.gpu import gpu_tile as tile
from kernels_pallas.flash_attention.gpu import sm80_mma as mma
from kernels_pallas.flash_attention.tpu.tpu_problem import varying

CHUNK = 32
"""Columns of the output that parts exchange at a time."""

FIELDS = ("row", "begin", "end")
"""What an entry says: whose keys, and which of them."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """The kernel's facts and arrays.

  Attributes:
    spec: Static part of the call.
    dims: (entries, items, K, blocks of queries, H, Hv).
    parts: Into which the warps cut a tile.
    keys: Of a tile.
    stages: Tiles that shared memory holds.
    source: Where keys lie.
    columns: From a key head to the first column of its keys and values.
    arrays: q `[items * K * rows, H]`, k and v `[lines, columns]`, table, work
      `[entries * 3]`, bounds `[entries, blocks, 2, 64]`; of quantized pages
      scales, as of `copy.fetch_scales`.
    interpreted: Whether stand-ins read it.
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
    """Of queries in a block."""
    return ROWS // self.parts

  @property
  def code(self) -> Any:
    """The dtype of quantized pages, or None."""
    return self.arrays["k"].dtype if "scales" in self.arrays else None

  @property
  def shared(self) -> int:
    """Bytes of shared memory, but for alignment."""
    (H, Hv), size = self.dims[-2:], self.arrays["k"].dtype.itemsize
    exchange = 4 * ROWS * (CHUNK + 2) if self.parts > 1 else 0
    token = size * (H + Hv) + 8 * (self.code is not None)
    return 2 * self.rows * H + self.stages * self.keys * token + exchange

  @property
  def mine(self) -> int:
    """Keys of a tile that a warp meets."""
    return self.keys // self.parts


def run(p: Plan, interpret: Any) -> tuple[jax.Array, jax.Array]:
  """Outputs [E, K, rows, Hv] and log-sum-exps [E, K, rows], in float32.

  Args:
    p: The plan.
    interpret: As of `plgpu.kernel`.
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
  part = copy.part(interpreted, p.parts)

  def step(n, carry):
    copy.wait(interpreted, p.stages - 2)
    fetch(n + p.stages - 1)
    slot = lax.rem(n, jnp.int32(p.stages))
    k, v = (smem[name].at[slot] for name in "kv")
    s = products.scores(p, interpreted, part, smem["q"], k)
    if p.code is not None:
      scales = smem["scales"].at[slot]
      s = s * products.scales(p, interpreted, part, scales, 0)
    key = plgpu.broadcasted_iota(
      jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA
    )
    since = first + n * p.keys
    seen = key < tile.spread(high - since, s.shape, 0)
    seen &= key >= tile.spread(low - since, s.shape, 0)
    acc, m, l, e = _softmax(p.spec, s, seen, carry)
    if p.code is not None:
      e = e * products.scales(p, interpreted, part, scales, p.keys)
    return products.values(p, interpreted, part, acc, e, v), m, l

  start = tile.zeros(ROWS, p.dims[-1]), tile.vector(-jnp.inf), tile.vector(0.0)
  acc, m, l = lax.fori_loop(0, steps, step, start)
  copy.wait(interpreted, 0)
  queries = pl.ds(block * p.rows, p.rows)
  _finish(
    p, smem, (acc, m, l), o_ref.at[entry, head, queries],
    lse_ref.at[entry, head, queries], interpreted,
  )  # fmt: skip


def _fetch_queries(p, interpreted, refs, target, where):
  """The block's queries."""
  entry, head, block = where
  _, items, K, blocks, _, _ = p.dims
  item = lax.rem(entry, jnp.int32(items))
  start = ((item * K + head) * blocks + block) * p.rows
  where = 0, 0, start, start, start + p.rows
  own, copies = copy.Source(p.rows, None, 1), [(refs["q"], 0, target)]
  copy.fetch(interpreted, own, refs["table"], copies, where)


def _softmax(spec, s, seen, carry):
  """A step of the online softmax: (acc, m, l, e), acc without the new tile."""
  acc, m, l = carry
  t = s * (spec.scale * tile.LOG2E)
  if spec.softcap is not None:
    # tanh of the hardware is good to 11 bits only: too little for logits.
    root = lax.rsqrt(1 + jnp.exp2(t * (2 / spec.softcap)))
    t = (1 - 2 * root * root) * (spec.softcap * tile.LOG2E)
  t = jnp.where(seen, t, -jnp.inf)
  m_new = jnp.maximum(m, t.max(axis=1))
  # No key seen so far: any finite number, so that exponentials are 0, not NaN.
  shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  e = jnp.exp2(t - tile.spread(shift, t.shape, 0))
  acc = acc * tile.spread(alpha, acc.shape, 0)
  return acc, m_new, l * alpha + e.sum(axis=1), e


def _finish(p, smem, state, o_ref, lse_ref, interpreted):
  """Combines the parts, in chunks of columns, and stores what is found."""
  acc, m, l = state
  if p.parts == 1:
    o, lse = tile.normalised(acc, m, l)
    mma.store(o, o_ref)
    mma.store(lse, lse_ref)
    return
  stats, exchange = smem["stats"], smem["o"]
  stats[0], stats[1] = m, l
  copy.meet(interpreted)
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
    copy.meet(interpreted)
    for rows, parts, factors in groups:
      found = sum(
        _load(exchange.at[part]) * tile.spread(factor, (WARP, CHUNK), 0)
        for part, factor in zip(parts, factors, strict=True)
      )
      mma.store(found, o_ref.at[rows, pl.ds(at, CHUNK)])
    copy.meet(interpreted)


def _weights(stats, parts):
  """Log-sum-exps of 16 rows, and what their parts' sums of values count."""
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
  """16 rows, or what belongs to them, as all four warps hold them."""
  layout = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=1)
  layout = layout if reduced is None else layout.reduce(reduced)
  return plgpu.load(ref, layout=layout, optimized=False)


def _columns(interpreted, acc, at):
  """Columns [at, at + CHUNK) of an accumulator."""
  if interpreted:
    return acc[:, at : at + CHUNK]
  layout = plgpu.Layout.WGMMA
  kind = plgpu.ShapeDtypeStruct((ROWS, CHUNK), acc.dtype, layout=layout)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=kind)
  def cut(_, values):
    return values[:, at : at + CHUNK]

  return cut(acc)
