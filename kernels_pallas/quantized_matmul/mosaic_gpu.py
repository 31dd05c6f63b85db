"""Products with `Planar` weights on a GPU, the mosaic_gpu backend.

W4A16, and W8A16 out of 8-bit codes in words (`planar.in_words`); activations
are bfloat16 or float16, sums float32.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lowering import (
  BLACKWELL,
  HOPPER,
  NO_GPU_KERNELS,
  device,
  has_mma,
)
from kernels_pallas.quantized_matmul import mosaic_gpu_kernel, mosaic_gpu_mma
from kernels_pallas.quantized_matmul.mosaic_gpu_operand import Problem
from kernels_pallas.quantized_matmul.mosaic_gpu_tiling import (
  DTYPES,
  Tile,
  fitted,
)
from kernels_pallas.quantized_matmul.planar import Planar

NO_STAND_IN = ("wgmma", "registers")
"""Cores and operand that the GPU interpreter does not have."""


def unsupported(dtype: Any, w: Planar) -> str | None:
  """Why the kernels cannot multiply such rows with `w`, or None."""
  if NO_GPU_KERNELS is not None:
    return NO_GPU_KERNELS
  if dtype not in DTYPES:
    return f"x: found {dtype}, expected bfloat16 or float16"
  if w.codes.dtype != jnp.uint32:
    return "codes: found int8, expected words: see planar.in_words"
  most = float(jnp.finfo(dtype).max)
  if w.codebook and max(map(abs, w.codebook)) > most:
    return f"codebook: found {w.codebook}, expected what {dtype} has"
  return None


FEW = 256
"""Rows up to which a Blackwell decodes and multiplies at once: see README."""

KERNELS = {"wgmma": mosaic_gpu_kernel, "mma": mosaic_gpu_mma}
"""Modules by `Tile.cores`."""


def cores() -> str | None:
  """`Tile.cores` for the program's device, or None without a kernel."""
  platform, kind = device()
  if platform not in ("gpu", "cuda"):
    return None
  if any(name in kind for name in HOPPER):
    return "wgmma"
  return "mma" if has_mma(kind) else None


def is_for(rows: int = 1) -> bool:
  """Whether the program is for a device that the kernels are best on.

  Args:
    rows: Of activations. Blackwell's `mma` is a fraction of its tensor cores,
      by which many rows are multiplied sooner, decoding included.
  """
  found = cores()
  blackwell = any(name in device()[1] for name in BLACKWELL)
  return found is not None and (rows <= FEW or not blackwell)


def product(
  x: Float[Array, "B I"],
  w: Planar,
  tile: Tile | None = None,
  interpret: Any = False,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32, on a GPU.

  Args:
    x: bfloat16 or float16; weights are rounded to its type.
    w: Without leading axes.
    tile: Sizes; by default fitted.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.

  Raises:
    ValueError: What the kernels do not compute.
  """
  return _run(x, w, 1, tile, interpret)[:, : w.outputs]


def input_gradient(
  dy: Float[Array, "B O"],
  w: Planar,
  tile: Tile | None = None,
  interpret: Any = False,
) -> Float[Array, "B I"]:
  """Returns `dy W^T` in the dtype of dy, from the same bytes.

  Args:
    dy: bfloat16 or float16.
    w: Without leading axes.
    tile: Sizes; by default fitted.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.

  Raises:
    ValueError: What the kernels do not compute.
  """
  return _run(dy, w, 0, tile, interpret)[:, : w.inputs]


def _run(x, w, inputs, tile, interpret):
  if reason := unsupported(x.dtype, w):
    raise ValueError(f"mosaic_gpu: {reason}")
  if interpret and (tile is None or (tile.cores, tile.operand) == NO_STAND_IN):
    raise ValueError(
      "interpret: the GPU interpreter's wgmma takes nothing from registers; "
      "pass Tile(operand='shared') or Tile(cores='mma')"
    )
  p, t, arrays, out = plan(x, w, inputs, tile or cores() or "wgmma")
  y = KERNELS[t.cores].multiply(p, t, arrays, out, interpret)
  y = y[0] if t.splits == 1 else y.sum(axis=0).astype(x.dtype)
  return y[: len(x)]


def plan(
  x: Float[Array, "B n"], w: Planar, inputs: int, tile: Tile | str
) -> tuple[Problem, Tile, dict[str, Any], Any]:
  """What a kernel is called with: problem, tile, arrays, type of its result.

  Args:
    x: Activations.
    w: Their matrix.
    inputs: As of `Problem`.
    tile: Sizes, or one of `Tile.cores` that they are fitted to.
  """
  M, padded = len(x), w.padded
  p = Problem(
    inputs=inputs,
    padded=padded,
    bits=w.bits,
    group=min(w.group, padded[0]),
    first=_first(w),
    codebook=w.codebook,
  )
  if isinstance(tile, str):
    tile = fitted(tile, M, p.width // p.kept, p.steps, p.depth, p.sums)
  rows = -(-M // tile.rows) * tile.rows
  x = jnp.pad(x, ((0, rows - M), (0, padded[1 - inputs] - x.shape[1])))
  arrays = {"x": x, "codes": w.codes, "scale": w.scale, "offset": w.offset}
  arrays = {name: x for name, x in arrays.items() if x is not None}
  return p, tile, arrays, x.dtype if tile.splits == 1 else jnp.float32


def _first(w: Planar) -> float | None:
  """What code 0 stands for, or None unless the next ones follow by ones."""
  if w.bits == 8:
    return -128.0
  first = w.codebook[0]
  follow = all(x == first + n for n, x in enumerate(w.codebook))
  return first if follow and first == int(first) else None
