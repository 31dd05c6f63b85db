"""Matmul with `Planar` weights on a TPU: the mosaic_tpu backend.

`few_rows` is bound by the weights' bytes, `many_rows` by the matrix units; the
backward pass is the latter, transposed, from the same packed weights.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul.activations import (
  check_activations,
  quantize_rows,
)
from kernels_pallas.quantized_matmul.planar import BLOCK, Planar
from kernels_pallas.quantized_matmul.tpu import problem
from kernels_pallas.quantized_matmul.tpu.few_rows import multiply_few_rows
from kernels_pallas.quantized_matmul.tpu.many_rows import (
  FORWARD,
  GRADIENT,
  multiply_many_rows,
)
from kernels_pallas.quantized_matmul.tpu.support import unsupported
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Config


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
