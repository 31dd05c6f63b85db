"""Products with `Planar` weights: TPU kernels, or XLA where there is no TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul import mosaic_tpu, planar
from kernels_pallas.quantized_matmul.mosaic_tpu import Config
from kernels_pallas.quantized_matmul.planar import Planar

BACKENDS = ("auto", "xla", "mosaic_tpu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def planar_matmul(
  x: Float[Array, "B I"],
  w: Planar,
  backend: str = "auto",
  activations: Any = None,
  config: Config = Config(),
  interpret: Any = False,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32.

  Differentiable in x; the backward pass keeps only W, packed, and decodes it
  again. Its gradient is that of rows as they were before `activations`.

  Args:
    x: float32 or bfloat16.
    w: Without leading axes.
    backend: 'mosaic_tpu'; 'xla', which decodes the matrix as a whole; 'auto'
      is the kernels in programs for a TPU, else XLA.
    activations: None, or int8 with 8-bit codes; see `mosaic_tpu.product`.
    config: Tiles of the kernels.
    interpret: False to compile the kernels, or as of `pl.pallas_call`.

  Raises:
    ValueError: Types that do not fit each other.
  """
  mosaic_tpu.check_activations(activations, w)

  def kernels(x, w):
    return mosaic_tpu.product(x, w, activations, config, interpret)

  def plain(x, w):
    return _plain(x, w, activations)

  return _choose(backend, kernels, plain, x, w)


def _choose(backend, kernels, plain, x, w):
  if backend == "mosaic_tpu":
    return kernels(x, w)
  if backend == "xla" or not mosaic_tpu.supports(x.dtype) or not len(x):
    return plain(x, w)
  # The platform is that of the program, which may be compiled for another one
  # than this process runs on.
  return jax.lax.platform_dependent(x, w, tpu=kernels, default=plain)


def _plain(x, w, activations):
  dtype = x.dtype
  if activations is not None:
    codes, unit = mosaic_tpu.quantize_rows(x)
    x = codes.astype(jnp.float32) * unit
  matrix = planar.dense(w, x.dtype)
  y = jnp.dot(x, matrix, preferred_element_type=_sums(dtype))
  return y.astype(dtype)


def _sums(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


def _forward(x, w, backend, activations, config, interpret):
  y = planar_matmul(x, w, backend, activations, config, interpret)
  return y, w


def _backward(backend, activations, config, interpret, w, dy):
  del activations

  def kernels(dy, w):
    return mosaic_tpu.input_gradient(dy, w, config, interpret)

  def plain(dy, w):
    matrix = planar.dense(w, dy.dtype)
    dx = jnp.dot(dy, matrix.T, preferred_element_type=_sums(dy.dtype))
    return dx.astype(dy.dtype)

  return _choose(backend, kernels, plain, dy, w), None


planar_matmul.defvjp(_forward, _backward)
