"""Matmul with `Planar` weights on a TPU: the mosaic_tpu backend.

`few_rows` is bound by the weights' bytes, `many_rows` by the matrix units; the
backward pass is the latter, transposed, from the same packed weights.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_pallas.quantized_matmul.planar import BLOCK, Planar
from kernels_pallas.quantized_matmul.tpu import problem
from kernels_pallas.quantized_matmul.tpu.few_rows import multiply_few_rows
from kernels_pallas.quantized_matmul.tpu.many_rows import (
  FORWARD,
  GRADIENT,
  multiply_many_rows,
)
from kernels_pallas.quantized_matmul.tpu.problem import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes of the matmul.

  Attributes:
    few: Tile for few rows.
    many: Tile for many rows.
    gradient: Tile for the input gradient.
    most: Rows, times the groups per block, up to which `few_rows` is used.
  """

  few: Tile = Tile(256, 2048, 1024)
  many: Tile = Tile(1024, 1024, 512)
  gradient: Tile = Tile(1024, 512, 1024)
  most: int = 128


def product(
  x: Float[Array, "B I"],
  w: Planar,
  activations: Any = None,
  config: Config = Config(),
  interpret: Any = False,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32, on a TPU.

  Args:
    x: float32 or bfloat16.
    w: Without leading axes.
    activations: None; or int8, to which each row is rounded, relative to its
      largest number, for int32 sums of 8-bit codes (LLM.int8, arXiv:2208.07339,
      equation 4, without outliers).
    config: Tile sizes.
    interpret: False to compile, or as in `pl.pallas_call`.

  Raises:
    ValueError: TPUs do not support the dtype, or int8 with 4-bit codes.
  """
  if reason := unsupported(x.dtype, w):
    raise ValueError(f"mosaic_tpu: {reason}")
  check_activations(activations, w)
  if activations is not None:
    codes, unit = quantize_rows(x)
    p = problem.prepare(w, config.few)
    y = multiply_few_rows(codes, p, jnp.float32, interpret)
    y = (y * unit).astype(x.dtype)
  elif len(x) * max(1, BLOCK // w.group) <= config.most:
    p = problem.prepare(w, config.few)
    y = multiply_few_rows(x, p, x.dtype, interpret)
  else:
    p = problem.prepare(w, config.many)
    y = multiply_many_rows(x, p, FORWARD, x.dtype, interpret)
  return y[:, : w.outputs]


def input_gradient(
  dy: Float[Array, "B O"],
  w: Planar,
  config: Config = Config(),
  interpret: Any = False,
) -> Float[Array, "B I"]:
  """Returns `dy W^T` in the dtype of dy, from the same packed weights.

  Args:
    dy: float32 or bfloat16.
    w: Without leading axes.
    config: Tile sizes.
    interpret: False to compile, or as in `pl.pallas_call`.
  """
  p = problem.prepare(w, config.gradient, outputs=True)
  return multiply_many_rows(dy, p, GRADIENT, dy.dtype, interpret)[:, : w.inputs]


def unsupported(dtype: Any, w: Planar) -> str | None:
  """Returns why the kernels cannot multiply such rows with `w`, or None."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return (
      f"found {dtype}, expected bfloat16 or float32, which are what TPUs "
      "compute in"
    )
  if w.bits == 8 and w.words:
    return "codes: found 8 bits in words, expected int8, as planar.pack leaves"
  return None


def check_activations(activations: Any, w: Planar) -> None:
  """Raises ValueError unless rows may be rounded to such codes for `w`."""
  if activations is None:
    return
  if (jnp.dtype(activations), w.bits) != (jnp.int8, 8):
    raise ValueError(
      f"activations: found {jnp.dtype(activations)} with {w.bits}-bit codes, "
      "expected None, or int8 with 8-bit codes"
    )


def quantize_rows(
  x: Float[Array, "B I"],
) -> tuple[Int8[Array, "B I"], Float[Array, "B 1"]]:
  """Rounds rows to int8 codes, to nearest, ties to even; also returns the
  units.

  A row's largest number has code 127 (or -127); a unit is the value of code 1.
  """
  wide = x.astype(jnp.float32)
  unit = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / 127
  codes = jnp.round(wide / jnp.where(unit == 0, 1, unit))
  return codes.astype(jnp.int8), unit
