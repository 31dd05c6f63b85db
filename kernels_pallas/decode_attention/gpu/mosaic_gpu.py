"""Decoding attention as a Mosaic kernel for GPUs, the mosaic_gpu backend.

`mosaic_gpu_kernel` is the kernel, for Ampere and what followed it; here is what
it is called with. Nothing is copied: caches and pages are arrays of rows to it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import gpu_copy as copy
from kernels_pallas.common.target_platform import NO_GPU_KERNELS, has_mma
from kernels_pallas.decode_attention.gpu import mosaic_gpu_codes as codes
from kernels_pallas.decode_attention.gpu import mosaic_gpu_kernel as kernel
from kernels_pallas.decode_attention.pages import LARGEST, Pages
from kernels_pallas.decode_attention.work import Cache, Problem, heads_of
from kernels_pallas.flash_attention.gpu.mosaic_gpu import DTYPES, no_kernel

KEYS, WIDE = 64, 512
"""Keys of a tile, but where a key and its value have more bytes than that: half
of them."""

HEAD_DIMS = (64, 128, 256)
"""Whose chunks divide a block's threads."""

SHARED_BYTES = 82_432
"""Shared memory of a block of which an A100 takes two."""

PROCESSORS = 132
"""Multiprocessors that work is cut for: those of an H100."""

MOST_SPLITS = 32


def refused(
  kind: str, dtype: Any, held: Cache | Pages | None, precision: Any = None
) -> str | None:
  """Why the kernel cannot run a call, or None.

  Args:
    kind: Of the device, or '' for any that has a kernel.
    dtype: Of the queries.
    held: Keys and values, or None for any.
    precision: Of the matmuls.
  """
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if kind and not has_mma(kind):
    return no_kernel(kind)
  if dtype not in DTYPES:
    return f"GPU kernels compute in bfloat16 and float16, found {dtype}"
  if precision not in (None, jax.lax.Precision.DEFAULT):
    return f"GPU kernels have one precision, found {precision}"
  if held is None:
    return None
  if _is_quantized(held) and dtype != jnp.bfloat16:
    # Probabilities times values' scales are operands: float16 has too few
    # exponents for the scales of small values.
    return f"GPU kernels read codes for bfloat16 queries, found {dtype}"
  for found in (x.dtype for x in _arrays(held)):
    if found != dtype and found not in LARGEST:
      return f"GPU kernels take keys of the queries' {dtype}, found {found}"
  dims = heads_of(held)[1:]
  if not set(dims) <= set(HEAD_DIMS):
    return f"GPU kernels take head dims of {HEAD_DIMS}, found {dims}"
  return None


def _arrays(held):
  return (held.k, held.v) if isinstance(held, Cache) else (held.kv,)


def splits_for(pieces: int, keys: int) -> int:
  """Runs that fill the multiprocessors twice, of at least 4 tiles each.

  Args:
    pieces: Items times key heads.
    keys: That a row has memory for.
  """
  wanted = -(-2 * PROCESSORS // pieces)
  return max(1, min(wanted, keys // (4 * KEYS), MOST_SPLITS))


def mosaic_gpu_decode(
  p: Problem, interpret: Any = None
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """The output and log-sum-exp of every entry, in float32.

  Args:
    p: The problem.
    interpret: None or False to compile, or a `plgpu.InterpretGPUParams`.
  """
  x = plan(p, bool(interpret))
  return finished(p, x, *kernel.run(x, interpret or False))


def finished(
  p: Problem, x: kernel.Plan, o: jax.Array, lse: jax.Array
) -> tuple[Float[Array, "E K M Hv"], Float[Array, "E K M"]]:
  """What the kernel found, without padding, its dims in their order.

  Args:
    p: The problem.
    x: Its plan.
    o: Outputs.
    lse: Log-sum-exps.
  """
  rows = p.q.shape[2]
  o, lse = o[:, :, :rows], lse[:, :, :rows]
  if x.code is not None and not x.interpreted:
    o = codes.from_values(o) * codes.factor(x.code)
  return o, lse


def plan(p: Problem, interpreted: bool = False) -> kernel.Plan:
  """What the kernel is called with.

  Args:
    p: The problem.
    interpreted: Whether addresses are computed of rows that are not read.
  """
  items, _, M, _ = p.q.shape
  (K, H, Hv), E = p.heads, items * p.splits
  parts = 4 if M <= kernel.WARP else 2 if M <= 2 * kernel.WARP else 1
  code = p.held.kv.dtype if _is_quantized(p.held) else None
  size = p.q.dtype.itemsize if code is None else 1
  keys, token = KEYS, size * (H + Hv) + 8 * (code is not None)
  # Else two tiles do not fit an Ada; or, with outputs of 64 rows so wide, the
  # scores of 64 keys do not fit the registers.
  if size * (H + Hv) > WIDE or (parts == 1 and Hv == HEAD_DIMS[-1]):
    keys, parts = KEYS // 2, min(parts, 2)
  rows = kernel.ROWS // parts
  blocks = -(-M // rows)
  q = jnp.pad(p.q, [(0, 0), (0, 0), (0, blocks * rows - M), (0, 0)])
  spec, scales = p.spec, {}
  if code is not None:
    scales["scales"] = p.held.scale.reshape(-1)
    if not interpreted:
      q = codes.for_keys(q)
      spec = dataclasses.replace(spec, scale=spec.scale * codes.factor(code))
  begin, end, bounds = _ranges(p, (parts, blocks, keys))
  lines, source, columns = _memory(p)
  if interpreted:
    lines = [jnp.pad(x, [(0, keys), (0, 0)]) for x in lines]
  table = jnp.zeros(1, jnp.int32) if p.table is None else p.table.reshape(-1)
  return kernel.Plan(
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
  """Keys and values as rows, where they lie, and columns of a head's."""
  K, H, Hv = p.heads
  if p.table is None:
    # The axes as they were when the call was made: nothing is copied.
    lines = [x.swapaxes(1, 2) for x in (p.held.k, p.held.v)]
    lines = [x.reshape(-1, K * x.shape[-1]) for x in lines]
    source = copy.Source(p.held.size, None, K)
    return lines, source, ((H, 0), (Hv, 0))
  lines = p.held.kv.reshape(-1, H + Hv)
  source = copy.Source(p.held.size, p.table.shape[1], K)
  return [lines, lines], source, ((0, 0), (0, H))


def _ranges(p: Problem, cut):
  """First key and the one after the last of entries; and of their rows."""
  (parts, blocks, keys), w = cut, p.work
  begin = jnp.maximum(w.low, w.base + w.start * p.block)
  end = jnp.minimum(w.high, w.base + w.stop * p.block)
  end = jnp.maximum(begin, end)
  rows = kernel.ROWS // parts
  warp, own = jnp.divmod(jnp.arange(kernel.ROWS), kernel.WARP)
  own += warp // parts * kernel.WARP
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
  """Of a ring of tiles of so many bytes: 2 to 4; two blocks fit an A100."""
  held = 2 * (kernel.ROWS // parts) * H
  held += (kernel.CHUNK + 2) * 4 * kernel.ROWS * (parts > 1)
  return max(2, min(4, (SHARED_BYTES - held) // size))


def _is_quantized(held: Cache | Pages) -> bool:
  return isinstance(held, Pages) and held.scale is not None
