"""Matmul with `Planar` weights on a GPU: the mosaic_gpu backend.

W4A16, and W8A16 from 8-bit codes in words (`planar.in_words`), with bfloat16 or
float16 activations and float32 sums. W8A8 from the same words, with activations
rounded to 8 bits here and int32 sums.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from kernels_pallas.common.target_platform import vary_like
from kernels_pallas.quantized_matmul.activations import (
  check_activations,
  quantize_rows,
)
from kernels_pallas.quantized_matmul.gpu import (
  sm80_kernel,
  sm90_kernel,
  w8a8,
)
from kernels_pallas.quantized_matmul.gpu.support import cores, unsupported
from kernels_pallas.quantized_matmul.gpu.tile_sizes import (
  MIN_CODES,
  Tile,
  default_tile,
)
from kernels_pallas.quantized_matmul.gpu.weight_operand import Problem
from kernels_pallas.quantized_matmul.planar import Planar

NO_STAND_IN = ("wgmma", "registers")
"""Cores and operand that the GPU interpreter does not support."""


KERNELS = {"wgmma": sm90_kernel, "mma": sm80_kernel}
"""Kernel modules by `Tile.cores`."""


def product(
  x: Float[Array, "B I"],
  w: Planar,
  tile: Tile | None = None,
  interpret: Any = False,
  activations: Any = None,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32, on a GPU.

  Args:
    x: bfloat16 or float16; weights are rounded to its dtype.
    w: Without leading axes.
    tile: Tile sizes; by default fitted.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.
    activations: None; or int8, to which each row is rounded, relative to its
      largest number, for int32 sums of 8-bit codes (as in `mosaic_tpu.product`)
      by `mma`. One scale must then serve all inputs.

  Raises:
    ValueError: The kernels do not support the product.
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
  """Returns `dy W^T` in the dtype of dy, from the same packed weights.

  Args:
    dy: bfloat16 or float16.
    w: Without leading axes.
    tile: Tile sizes; by default fitted.
    interpret: False to compile, or a `plgpu.InterpretGPUParams`.

  Raises:
    ValueError: The kernels do not support the product.
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
  y = vary_like(y, arrays.values())
  y = y[0] if t.splits == 1 else y.sum(axis=0).astype(x.dtype)
  return y[: len(x)]


def _of_codes(x, w, tile, interpret):
  """Multiplies rows rounded to 8 bits."""
  check_activations(jnp.int8, w)
  if reason := unsupported(x.dtype, w, jnp.int8):
    raise ValueError(f"mosaic_gpu: {reason}")
  if tile is not None and (tile.cores, tile.rows % MIN_CODES) != ("mma", 0):
    raise ValueError(
      f"tile: found {tile}, expected mma, and rows in multiples of "
      f"{MIN_CODES} for codes"
    )
  if not len(x):
    return jnp.zeros((0, w.outputs), x.dtype)
  codes, unit = quantize_rows(x)
  p, t, arrays, _ = plan(codes, w, 1, tile or "mma")
  y = sm80_kernel.multiply(p, t, arrays, jnp.int32, interpret)
  y = vary_like(y, arrays.values())
  y = y.sum(axis=0)[: len(x)].astype(jnp.float32) * w.scale
  if w.offset is not None:
    sums = codes.astype(jnp.int32).sum(axis=1, keepdims=True)
    y = y + sums.astype(jnp.float32) * w.offset
  return (y * unit).astype(x.dtype)[:, : w.outputs]


def plan(
  x: Num[Array, "B n"], w: Planar, inputs: int, tile: Tile | str
) -> tuple[Problem, Tile, dict[str, Any], Any]:
  """Returns a kernel's arguments: problem, tile, arrays, dtype of its result.

  Args:
    x: Activations, or int8 codes of them.
    w: Their matrix.
    inputs: As in `Problem`.
    tile: Tile sizes, or one of `Tile.cores` to fit them to.

  Raises:
    ValueError: The tile does not fit the matrix.
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
    tile = default_tile(tile, M, *sizes, codes=p.integers)
  pieces = p.width // p.kept
  if pieces % tile.groups or tile.splits > p.steps:
    raise ValueError(
      f"tile: found {tile.groups} groups and {tile.splits} splits, expected a "
      f"divisor of {pieces} pieces of {p.kept}, and at most {p.steps} splits"
    )
  rows = -(-M // tile.rows) * tile.rows
  x = jnp.pad(x, ((0, rows - M), (0, padded[1 - inputs] - x.shape[1])))
  if p.integers:
    return p, tile, {"x": w8a8.ordered(x), "codes": w.codes}, jnp.int32
  arrays = {"x": x, "codes": w.codes, "scale": w.scale, "offset": w.offset}
  arrays = {name: x for name, x in arrays.items() if x is not None}
  return p, tile, arrays, x.dtype if tile.splits == 1 else jnp.float32


def _first(w: Planar) -> float | None:
  """Returns the value of code 0 if values are consecutive integers, or None."""
  if w.bits == 8:
    return -128.0
  first = w.codebook[0]
  follow = all(x == first + n for n, x in enumerate(w.codebook))
  return first if follow and first == int(first) else None
