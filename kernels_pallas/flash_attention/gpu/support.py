"""What the GPU kernels support: devices, dtypes, arguments.

It imports no kernel: compilers for GPUs take a quarter of the time in which a
command on a CPU starts.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common.target_platform import (
  AMPERE,
  BLACKWELL,
  HOPPER,
  NO_GPU_KERNELS,
  NO_TCGEN05,
)
from kernels_pallas.flash_attention.gpu.tile_sizes import PROGRAMS

DTYPES = (jnp.bfloat16, jnp.float16)


def cores(kind: str) -> str | None:
  """Returns the device kind's `GpuTiles.cores`, or None without a kernel."""
  if any(name in kind for name in HOPPER):
    return "wgmma"
  if any(name in kind for name in BLACKWELL) and NO_TCGEN05 is None:
    return "tcgen05"
  return "mma" if any(name in kind for name in AMPERE) else None


def no_kernel_reason(kind: str) -> str:
  """Returns why a device kind has no kernel."""
  if any(name in kind for name in BLACKWELL) and NO_TCGEN05 is not None:
    return NO_TCGEN05
  known = "Ampere, Ada, Hopper and the B100, B200 and B300"
  return f"there is no kernel for {kind}, but for {known}"


def num_multiprocessors(kind: str) -> int:
  """Returns the multiprocessors of a device kind, one persistent block for
  each.

  Queried from a present device of this kind, otherwise assumed from its name,
  as a Hopper or Blackwell. Excess blocks would run in a second wave.
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
  """Returns why the kernels cannot run a call, with the argument, or None."""
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if any(y.dtype != q.dtype or y.dtype not in DTYPES for y in (q, k, v)):
    return (
      f"dtype: found q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one of "
      "bfloat16 and float16"
    )
  if bias is not None:
    return "bias: found one, expected None; GPU kernels do not support it"
  if precision not in (None, jax.lax.Precision.DEFAULT):
    return (
      f"precision: found {precision!r}, expected None; tensor cores multiply "
      "16 bits and sum in float32"
    )
  return None
