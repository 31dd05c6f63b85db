"""Decode attention as a Mosaic GPU kernel: the mosaic_gpu backend.

`sm80_kernel` contains the kernel, for Ampere and later; this module prepares
its arguments. Nothing is copied: the kernel sees caches and pages as arrays of
rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.decode_attention.gpu import quantized_pages, sm80_kernel
from kernels_pallas.decode_attention.gpu.support import (
  HEAD_DIMS,
  KEYS,
  is_quantized,
)
from kernels_pallas.decode_attention.work import Problem

WIDE = 512
"""Bytes of a token's key and value above which a tile has half as many keys."""

SHARED_BYTES = 82_432
"""Shared memory per block with which an A100 runs two blocks."""


def mosaic_gpu_decode(
  p: Problem, interpret: Any = None
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """Returns the output and log-sum-exp of every entry, in float32.

  Args:
    p: The problem.
    interpret: None or False to compile, or a `plgpu.InterpretGPUParams`.
  """
  x = plan(p, bool(interpret))
  return restore_outputs(p, x, *sm80_kernel.run(x, interpret or False))


def restore_outputs(
  p: Problem, x: sm80_kernel.Plan, o: jax.Array, lse: jax.Array
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """Removes padding from the kernel's results and restores the order of dims.

  Args:
    p: The problem.
    x: Its plan.
    o: Outputs.
    lse: Log-sum-exps.
  """
  rows = p.q.shape[2]
  o, lse = o[:, :, :rows], lse[:, :, :rows]
  if x.code is not None and not x.interpreted:
    o = quantized_pages.from_values(o) * quantized_pages.factor(x.code)
  return o, lse


def plan(p: Problem, interpreted: bool = False) -> sm80_kernel.Plan:
  """Returns the kernel's arguments.

  Args:
    p: The problem.
    interpreted: Whether the kernel is interpreted, which computes addresses of
      rows that it does not read.
  """
  items, _, M, _ = p.q.shape
  (K, H, Hv), E = p.heads, items * p.splits
  parts = 4 if M <= sm80_kernel.WARP else 2 if M <= 2 * sm80_kernel.WARP else 1
  code = p.storage.kv.dtype if is_quantized(p.storage) else None
  size = p.q.dtype.itemsize if code is None else 1
  keys, token = KEYS, size * (H + Hv) + 8 * (code is not None)
  # Otherwise two tiles do not fit an Ada; or, with such wide outputs of 64
  # rows, the scores of 64 keys do not fit the registers.
  if size * (H + Hv) > WIDE or (parts == 1 and Hv == HEAD_DIMS[-1]):
    keys, parts = KEYS // 2, min(parts, 2)
  rows = sm80_kernel.ROWS // parts
  blocks = -(-M // rows)
  q = jnp.pad(p.q, [(0, 0), (0, 0), (0, blocks * rows - M), (0, 0)])
  spec, scales = p.spec, {}
  if code is not None:
    scales["scales"] = p.storage.scale.reshape(-1)
    if not interpreted:
      q = quantized_pages.for_keys(q)
      spec = dataclasses.replace(
        spec, scale=spec.scale * quantized_pages.factor(code)
      )
  begin, end, bounds = _ranges(p, (parts, blocks, keys))
  lines, source, columns = _memory(p)
  if interpreted:
    lines = [jnp.pad(x, [(0, keys), (0, 0)]) for x in lines]
  table = jnp.zeros(1, jnp.int32) if p.table is None else p.table.reshape(-1)
  return sm80_kernel.Plan(
    spec=spec,
    dims=(E, items, K, blocks, H, Hv),
    parts=parts,
    keys=keys,
    stages=_stages(keys * token, parts, H),
    source=source,
    columns=columns,
    arrays={
      "q": q.reshape(-1, H),
      "k": lines[0],
      "v": lines[1],
      "table": table,
      "work": jnp.stack([p.work.row, begin, end], 1).reshape(-1),
      "bounds": bounds,
      **scales,
    },
    interpreted=interpreted,
  )


def _memory(p: Problem):
  """Returns keys and values as rows, how tokens map to them, and columns."""
  K, H, Hv = p.heads
  if p.table is None:
    # The axes in the caller's original order, so nothing is copied.
    lines = [x.swapaxes(1, 2) for x in (p.storage.k, p.storage.v)]
    lines = [x.reshape(-1, K * x.shape[-1]) for x in lines]
    source = copy.Source(p.storage.size, None, K)
    return lines, source, ((H, 0), (Hv, 0))
  lines = p.storage.kv.reshape(-1, H + Hv)
  source = copy.Source(p.storage.size, p.table.shape[1], K)
  return [lines, lines], source, ((0, 0), (0, H))


def _ranges(p: Problem, cut):
  """Returns the key range of each entry, and of each of its rows."""
  (parts, blocks, keys), w = cut, p.work
  begin = jnp.maximum(w.low, w.base + w.start * p.block)
  end = jnp.minimum(w.high, w.base + w.stop * p.block)
  end = jnp.maximum(begin, end)
  rows = sm80_kernel.ROWS // parts
  warp, own = jnp.divmod(jnp.arange(sm80_kernel.ROWS), sm80_kernel.WARP)
  own += warp // parts * sm80_kernel.WARP
  query = (jnp.arange(blocks)[:, None] * rows + own) // p.group
  part = warp % parts
  position = w.position[:, None, None] + query
  live = query < w.count[:, None, None]
  high = jnp.minimum(end[:, None, None], position + 1)
  low = jnp.broadcast_to(begin[:, None, None], high.shape)
  if p.spec.window is not None:
    low = jnp.maximum(low, position - p.spec.window + 1)
  high = jnp.where(live, high, low)
  bounds = jnp.stack([low, high], axis=2) - part * (keys // parts)
  return begin, end, bounds.astype(jnp.int32)


def _stages(size: int, parts: int, H: int) -> int:
  """Returns the ring's tiles: 2 to 4, so that an A100 runs two blocks."""
  used = 2 * (sm80_kernel.ROWS // parts) * H
  used += (sm80_kernel.CHUNK + 2) * 4 * sm80_kernel.ROWS * (parts > 1)
  return max(2, min(4, (SHARED_BYTES - used) // size))
