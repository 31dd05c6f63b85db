"""Products with `Planar` weights on a GPU, the mosaic_gpu backend.

W4A16, and W8A16 out of 8-bit codes in words (`planar.in_words`); activations
are bfloat16 or float16, sums float32. W8A8 out of the same words, of
activations that are rounded to 8 bits here, sums int32.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from kernels_pallas.common.target_platform import (
  BLACKWELL,
  HOPPER,
  NO_GPU_KERNELS,
  device,
  has_mma,
  spread,
)
from kernels_pallas.quantized_matmul.gpu import mosaic_gpu_integers as integers
from kernels_pallas.quantized_matmul.gpu import (
  mosaic_gpu_kernel,
  mosaic_gpu_mma,
)
from kernels_pallas.quantized_matmul.gpu.mosaic_gpu_operand import Problem
from kernels_pallas.quantized_matmul.gpu.mosaic_gpu_tiling import (
  DTYPES,
  LEAST_CODES,
  Tile,
  fitted,
)
from kernels_pallas.quantized_matmul.planar import Planar
from kernels_pallas.quantized_matmul.tpu.mosaic_tpu import (
  check_activations,
  quantize_rows,
)

NO_STAND_IN = ("wgmma", "registers")
"""Cores and operand that the GPU interpreter does not have."""


def unsupported(dtype: Any, w: Planar, activations: Any = None) -> str | None:
  """Why the kernels cannot multiply such rows with `w`, or None."""
  if activations is not None and w.group < w.padded[0]:
    return (
      f"activations: found groups of {w.group} of {w.inputs} inputs, expected "
      "a scale for each output"
    )
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
  activations: Any = None,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32, on a GPU.

  Args:
    x: bfloat16 or float16; weights are rounded to its type.
    w: Without leading axes.
    tile: Sizes; by default fitted.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    activations: None; or int8, to which each row is then rounded, by its
      largest number, for sums of 8-bit codes in int32 (as `mosaic_tpu.product`)
      by `mma`. A scale then serves all inputs.

  Raises:
    ValueError: What the kernels do not compute.
  """
  if activations is not None:
    return _of_codes(x, w, tile, interpret)
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
  if not len(x):
    return jnp.zeros((0, w.padded[inputs]), x.dtype)
  p, t, arrays, out = plan(x, w, inputs, tile or cores() or "wgmma")
  y = KERNELS[t.cores].multiply(p, t, arrays, out, interpret)
  y = spread(y, arrays.values())
  y = y[0] if t.splits == 1 else y.sum(axis=0).astype(x.dtype)
  return y[: len(x)]


def _of_codes(x, w, tile, interpret):
  """A product of rows that are rounded to 8 bits."""
  check_activations(jnp.int8, w)
  if reason := unsupported(x.dtype, w, jnp.int8):
    raise ValueError(f"mosaic_gpu: {reason}")
  if tile is not None and (tile.cores, tile.rows % LEAST_CODES) != ("mma", 0):
    raise ValueError(
      f"tile: found {tile}, expected mma, and rows in multiples of "
      f"{LEAST_CODES} for codes"
    )
  if not len(x):
    return jnp.zeros((0, w.outputs), x.dtype)
  codes, unit = quantize_rows(x)
  p, t, arrays, _ = plan(codes, w, 1, tile or "mma")
  y = mosaic_gpu_mma.multiply(p, t, arrays, jnp.int32, interpret)
  y = spread(y, arrays.values())
  y = y.sum(axis=0)[: len(x)].astype(jnp.float32) * w.scale
  if w.offset is not None:
    sums = codes.astype(jnp.int32).sum(axis=1, keepdims=True)
    y = y + sums.astype(jnp.float32) * w.offset
  return (y * unit).astype(x.dtype)[:, : w.outputs]


def plan(
  x: Num[Array, "B n"], w: Planar, inputs: int, tile: Tile | str
) -> tuple[Problem, Tile, dict[str, Any], Any]:
  """What a kernel is called with: problem, tile, arrays, type of its result.

  Args:
    x: Activations, or int8 codes of them.
    w: Their matrix.
    inputs: As of `Problem`.
    tile: Sizes, or one of `Tile.cores` that they are fitted to.

  Raises:
    ValueError: A tile that does not fit the matrix.
  """
  M, padded = len(x), w.padded
  p = Problem(
    inputs=inputs,
    padded=padded,
    bits=w.bits,
    group=min(w.group, padded[0]),
    first=_first(w),
    codebook=w.codebook,
    integers=x.dtype == jnp.int8,
  )
  if isinstance(tile, str):
    sizes = p.width // p.kept, p.steps, p.depth, p.sums
    tile = fitted(tile, M, *sizes, codes=p.integers)
  pieces = p.width // p.kept
  if pieces % tile.groups or tile.splits > p.steps:
    raise ValueError(
      f"tile: found {tile.groups} groups and {tile.splits} splits, expected a "
      f"divisor of {pieces} pieces of {p.kept}, and at most {p.steps} splits"
    )
  rows = -(-M // tile.rows) * tile.rows
  x = jnp.pad(x, ((0, rows - M), (0, padded[1 - inputs] - x.shape[1])))
  if p.integers:
    return p, tile, {"x": integers.ordered(x), "codes": w.codes}, jnp.int32
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
