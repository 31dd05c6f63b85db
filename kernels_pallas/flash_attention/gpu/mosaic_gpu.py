"""Flash attention as Mosaic kernels for GPUs, the mosaic_gpu backend.

`mosaic_gpu_forward` and `mosaic_gpu_backward` hold the kernels for Hopper,
`mosaic_gpu_ampere` and `mosaic_gpu_ampere_backward` those for Ampere and Ada,
`mosaic_gpu_blackwell` and `mosaic_gpu_blackwell_backward` those for Blackwell;
`mosaic_gpu_problem` is what they are called with. The saved output and
log-sum-exp have the names that `blocked` gives them.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import (
  AMPERE,
  BLACKWELL,
  HOPPER,
  NO_GPU_KERNELS,
  NO_TCGEN05,
  spread,
)
from kernels_pallas.flash_attention.cotangents import (
  Queries,
  finished,
  kept,
  queries,
)
from kernels_pallas.flash_attention.gpu import gpu_problem as problem
from kernels_pallas.flash_attention.gpu import (
  sm80_backward,
  sm80_forward,
  sm90_backward,
  sm90_forward,
  sm100_backward,
  sm100_forward,
)
from kernels_pallas.flash_attention.gpu.gpu_tile import LOG2E
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import (
  PROGRAMS,
  GpuTiles,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.flash_attention.tpu.tpu_problem import pad

DTYPES = (jnp.bfloat16, jnp.float16)

FORWARD = {
  "wgmma": sm90_forward,
  "mma": sm80_forward,
  "tcgen05": sm100_forward,
}
BACKWARD = {
  "wgmma": sm90_backward,
  "mma": sm80_backward,
  "tcgen05": sm100_backward,
}
"""Modules by `GpuTiles.cores`."""


def cores(kind: str) -> str | None:
  """`GpuTiles.cores` of a device kind, or None where there is no kernel."""
  if any(name in kind for name in HOPPER):
    return "wgmma"
  if any(name in kind for name in BLACKWELL) and NO_TCGEN05 is None:
    return "tcgen05"
  return "mma" if any(name in kind for name in AMPERE) else None


def no_kernel(kind: str) -> str:
  """Why there is none for a device kind."""
  if any(name in kind for name in BLACKWELL) and NO_TCGEN05 is not None:
    return NO_TCGEN05
  known = "Ampere, Ada, Hopper and the B100, B200 and B300"
  return f"there is no kernel for {kind}, but for {known}"


def programs(kind: str) -> int:
  """Multiprocessors of a device kind, of which each runs a persistent kernel.

  As the device at hand counts them where it is of the kind; else by its name,
  that of a Hopper or a Blackwell. Too many would leave a second round to a few
  of them.
  """
  for device in jax.devices():
    if device.device_kind == kind and getattr(device, "core_count", None):
      return device.core_count
  if any(name in kind for name in BLACKWELL):
    return 148
  if "PCIe" in kind:
    return 114
  return 78 if re.search(r"H20\b", kind) else PROGRAMS


def unsupported(
  q: Any, k: Any, v: Any, bias: Any = None, precision: Any = None
) -> str | None:
  """Why the kernels cannot run a call, with the argument's name, or None."""
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if any(y.dtype != q.dtype or y.dtype not in DTYPES for y in (q, k, v)):
    return (
      f"dtype: found q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one of "
      "bfloat16 and float16"
    )
  if bias is not None:
    return "bias: found one, expected None; the GPU kernels have none"
  if precision not in (None, jax.lax.Precision.DEFAULT):
    return (
      f"precision: found {precision!r}, expected None; tensor cores multiply "
      "16 bits and sum in float32"
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mosaic_gpu_attention(
  spec: Spec, interpret: Any, x: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Softmax attention (kernels.md 2.1) on a GPU, with its own gradient.

  Differentiable once in q, k, v and sinks, through both results.

  Args:
    spec: Static part; `spec.blocks` is a `GpuTiles`.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    x: Arrays.

  Returns:
    The output, in the dtype of q unless `spec.output` says otherwise, and the
    natural log-sum-exp of the logits (sinks included, before dropout); 0 and
    -inf where a query sees no key and there is no sink.

  Raises:
    ValueError: What these kernels do not compute, with what does.
  """
  tiles = _tiles(spec, interpret, x)
  p = problem.prepare(spec, x, tiles.forward, problem.KEYS)
  o, lse = FORWARD[tiles.cores].forward(p, interpret)
  T, Hv = x.q.shape[1], x.v.shape[-1]
  return _typed(x, (o[:, :T, :, :Hv], lse[:, :, :T]))


def _typed(x: Operands, results: Any) -> Any:
  """Results that differ between devices wherever an operand does.

  A kernel's own say nothing of it: gradients would be refused, or cotangents of
  all devices added up.
  """
  return jax.tree.map(lambda y: spread(y, (x.q, x.k, x.v)), results)


def _forward(spec, interpret, x):
  return kept(x, *mosaic_gpu_attention.__wrapped__(spec, interpret, x))


def _backward(spec, interpret, saved, cotangents):
  x, o, lse = saved
  rows = queries(x, o, lse, *cotangents)
  found = narrow_gradients(spec, interpret, x, rows)
  return (finished(x, found, rows),)


def mosaic_gpu_gradients(
  spec: Spec, interpret: Any, x: Operands, rows: Queries
) -> Operands:
  """Gradients of q, k and v in float32, as they were summed.

  Args:
    spec: Static part; `spec.blocks` is a `GpuTiles`.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    x: Arrays; sinks are not looked at.
    rows: What the queries saw, these keys and perhaps others.
  """
  wide = dataclasses.replace(spec, output=jnp.float32)
  return narrow_gradients(wide, interpret, x, rows)


def narrow_gradients(
  spec: Spec, interpret: Any, x: Operands, rows: Queries
) -> Operands:
  """As `mosaic_gpu_gradients`, but rounded once to the type of the output.

  Args:
    spec, interpret, x, rows: As of `mosaic_gpu_gradients`.
  """
  (_, T, _, H), S, Hv = x.q.shape, x.k.shape[1], x.v.shape[-1]
  tiles = _tiles(spec, interpret, x)
  back = BACKWARD[tiles.cores]

  def prepare(tile, streamed):
    return _with_cotangents(problem.prepare(spec, x, tile, streamed), *rows)

  dq = back.dq(prepare(tiles.dq, problem.KEYS), interpret)
  p, found = prepare(tiles.dkv, problem.QUERIES), {}
  for names in tiles.gradients:
    found |= back.dkv(p, names, interpret)
  return _typed(
    x,
    Operands(
      q=dq[:, :T, :, :H],
      k=found["dk"][:, :S, :, :H],
      v=found["dv"][:, :S, :, :Hv],
      mask=None,
    ),
  )


def _with_cotangents(p: problem.Problem, do, lse, shift) -> problem.Problem:
  """The problem with the arrays of the backward pass."""
  T = p.dims[3]
  do = problem.padded(pad(do.astype(p.arrays["q"].dtype), 1, T), 1)
  rows = (pad(lse * LOG2E, 2, T, jnp.inf), pad(shift, 2, T))
  more = {"do": do, "stats": jnp.stack(rows, axis=2)}
  return dataclasses.replace(p, arrays={**p.arrays, **more})


def _tiles(spec: Spec, interpret: Any, x: Operands) -> GpuTiles:
  """The call's tiles; raises where these kernels cannot take the call."""
  tiles = spec.blocks
  if not isinstance(tiles, GpuTiles):
    raise ValueError(
      f"config: found {tiles!r}, expected a `gpu_tile_sizes.GpuTiles` for "
      "mosaic_gpu"
    )
  reason = unsupported(x.q, x.k, x.v, x.bias, spec.precision)
  if reason is not None:
    raise ValueError(f"mosaic_gpu: {reason}; backend='xla_blockwise' takes it")
  reason = NO_TCGEN05 if tiles.cores == "tcgen05" else None
  if reason is not None:
    raise ValueError(f"mosaic_gpu: {reason}; backend='xla_blockwise' does not")
  if interpret and tiles.cores != "tcgen05" and tiles.operand != "shared":
    raise ValueError(
      "interpret: the GPU interpreter has no matmul with operands in "
      "registers; pass config=GpuTiles(operand='shared')"
    )
  return tiles


mosaic_gpu_attention.defvjp(_forward, _backward)
