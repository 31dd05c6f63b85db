"""What backend 'auto' stands for on a device, and why.

What a kernel refuses stands here, in words; `backends` says what a call runs.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import target_platform
from kernels_pallas.flash_attention import cpu
from kernels_pallas.flash_attention.gpu import mosaic_gpu
from kernels_pallas.flash_attention.gpu.gpu_tile_sizes import (
  GpuTiles,
  height,
)
from kernels_pallas.flash_attention.spec import Blocks, Operands, Spec
from kernels_pallas.flash_attention.tpu.tpu_tile_sizes import LANES, Tiles
from kernels_pallas.masks import intervals

KERNELS = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu", "cpu": "cpu"}
"""By platform, as lowering calls it."""

Sizes = Blocks | cpu.CpuTiles | Tiles | GpuTiles

GPUS = ("gpu", "cuda")
WIDEST = 256
"""Head dim above which GPU tiles outgrow registers and shared memory."""


def choose(
  q: Float[Array, "B T N H"],
  config: Sizes | None = None,
  bias: Float[Array, "..."] | None = None,
  precision: Any = None,
) -> tuple[str, str]:
  """What backend 'auto' stands for here, whatever the mask, and why.

  Of a call without soft cap, dropout and sinks, which a kernel may not take.

  The platform is that of the mesh that is set, which may be a topology to
  compile for, else that of the default device; a call without a mesh goes by
  what it is lowered for (`automatic`).

  Args:
    q: Queries; keys and values are taken to be of their dtype and dim.
    config: Tile sizes, if the caller gave any.
    bias: Added to the logits, if any.
    precision: Of the matmuls.
  """
  x = Operands(q, q, q, None, bias)
  spec = Spec(scale=1.0, precision=precision)
  return ready(*choice(x, target_platform.device(), config, spec))


def ready(name: str, why: str) -> tuple[str, str]:
  """A choice as it turns out where the program is made: with a compiler?"""
  if name == "cpu" and not cpu.available():
    return "xla_blockwise", "no C++ kernel can be compiled here"
  return name, why


def choice(
  x: Operands, device: tuple[str, str], config: Any, spec: Spec
) -> tuple[str, str]:
  """What backend 'auto' stands for on a device, and why.

  Args:
    x: Arrays of the call.
    device: Platform and kind.
    config: Tile sizes, if the caller gave any.
    spec: Static part; its blocks are not looked at.
  """
  platform, kind = device
  if isinstance(config, Blocks):
    return "xla_blockwise", "config is a Blocks"
  if platform in (*GPUS, *KERNELS) and (reason := _refused_by_all(x)):
    return "xla_blockwise", reason
  if platform in GPUS:
    reason = _refused_by_gpu(x, kind, spec.precision)
    return _either("mosaic_gpu", reason, f"the program is for {kind}")
  if platform == "tpu":
    reason = _refused_by_tpu(x)
    return _either("mosaic_tpu", reason, "the program is for a TPU")
  if platform == "cpu":
    return _either("cpu", _refused_by_cpu(x, spec), "the program is for a CPU")
  return "xla_blockwise", f"there is no kernel for platform {platform} yet"


def _either(kernel, refusal, why):
  return (kernel, why) if refusal is None else ("xla_blockwise", refusal)


def _refused_by_all(x) -> str | None:
  if x.mask is None or x.mask.kind != "function":
    return None
  found = intervals.rows(x.mask, x.q.shape[1], x.k.shape[1])
  return None if found.unlisted is None else intervals.TOO_MANY


def _refused_by_gpu(x, kind, precision) -> str | None:
  cores = mosaic_gpu.cores(kind)
  if cores is None:
    return mosaic_gpu.no_kernel(kind)
  reason = mosaic_gpu.unsupported(x.q, x.k, x.v, x.bias, precision)
  if reason is not None:
    return reason
  wide = max(x.q.shape[-1], x.v.shape[-1])
  if wide > WIDEST:
    return f"GPU kernels hold head dims of at most {WIDEST}, found {wide}"
  rows = height(cores)
  if x.q.shape[1] < rows:
    return f"a GPU kernel would pad T to {rows} queries"
  return None


def _refused_by_tpu(x) -> str | None:
  for y in (x.q, x.k, x.v):
    if y.dtype not in (jnp.bfloat16, jnp.float32):
      return f"TPU kernels do not compute in {y.dtype}"
  if x.q.shape[1] < LANES:
    why = f"a TPU kernel would pad T to {LANES} queries"
    return f"{why}; decode_attention's would not"
  return None


def _refused_by_cpu(x, spec) -> str | None:
  if x.q.shape[1] < cpu.FEWEST:
    return f"a CPU kernel is for {cpu.FEWEST} queries or more"
  if reason := cpu.unsupported(spec, x):
    return reason
  if target_platform.is_cut():
    return "XLA would gather what a mesh cuts; a shard_map would not"
  return None
