"""Matmul with `Planar` weights: kernels on TPU and GPU, else XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import target_platform
from kernels_pallas.quantized_matmul import gpu, planar, tpu
from kernels_pallas.quantized_matmul.activations import (
  check_activations,
  quantize_rows,
)
from kernels_pallas.quantized_matmul.gpu.tile_sizes import Tile
from kernels_pallas.quantized_matmul.planar import Planar
from kernels_pallas.quantized_matmul.tpu.tile_sizes import Config

BACKENDS = ("auto", "xla", "mosaic_tpu", "mosaic_gpu")


def planar_matmul(
  x: Float[Array, "B I"],
  w: Planar,
  backend: str = "auto",
  activations: Any = None,
  config: Config | Tile | None = None,
  interpret: Any = False,
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32.

  Differentiable in x; the backward pass saves only W, packed, and decodes it
  again. The gradient ignores the rounding of `activations`.

  A kernel is a program for one device: under a mesh, 'auto' takes kernels only
  within a `shard_map` over it, and otherwise XLA, which partitions its own
  matmul.

  Args:
    x: float32 or bfloat16; for GPUs bfloat16 or float16.
    w: Without leading axes.
    backend: 'mosaic_tpu', 'mosaic_gpu'; 'xla', which dequantizes the whole
      matrix; 'auto' takes the kernels in programs for a TPU or a GPU (Ampere,
      Ada, Hopper, B100 to B300), else XLA; on Blackwell, XLA for many rows.
    activations: None, or int8 with 8-bit codes; see `mosaic_tpu.product`.
    config: Tile sizes: `Config` for TPUs, `Tile` for GPUs.
    interpret: False to compile the kernels, or as in `pl.pallas_call`.

  Raises:
    ValueError: Types do not match, or the backend is unknown.
  """
  if backend not in BACKENDS:
    raise ValueError(
      f"backend: found {backend!r}, available: {', '.join(BACKENDS)}"
    )
  check_activations(activations, w)
  if jax.sharding.get_abstract_mesh().manual_axes:
    # Each device multiplies the shared rows with its part of W. Marking rows as
    # varying sums their gradients outside of the kernel.
    never = jnp.zeros_like(w.codes, bool, shape=())
    x = jnp.where(never, jnp.zeros((), x.dtype), x)
  return _product(x, w, backend, activations, config, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _product(x, w, backend, activations, config, interpret):
  def on_tpu(x, w):
    return tpu.product(x, w, activations, config or Config(), interpret)

  def on_gpu(x, w):
    return gpu.product(x, w, config, interpret, activations)

  def plain(x, w):
    return _plain(x, w, activations)

  return _choose(backend, on_tpu, on_gpu, plain, x, w, activations)


def _choose(backend, on_tpu, on_gpu, plain, x, w, activations=None):
  if backend in ("mosaic_tpu", "mosaic_gpu"):
    return (on_tpu if backend == "mosaic_tpu" else on_gpu)(x, w)
  if backend == "xla" or not len(x) or target_platform.may_be_sharded():
    return plain(x, w)
  # The platform is that of the program, which may be compiled for another one
  # than the process runs on.
  kernels = {}
  if tpu.unsupported(x.dtype, w) is None:
    kernels["tpu"] = on_tpu
  faster = gpu.is_for(len(x))
  if faster and gpu.unsupported(x.dtype, w, activations) is None:
    kernels["cuda"] = on_gpu
  return jax.lax.platform_dependent(x, w, **kernels, default=plain)


def _plain(x, w, activations):
  dtype = x.dtype
  if activations is not None:
    codes, unit = quantize_rows(x)
    x = codes.astype(jnp.float32) * unit
  matrix = planar.dense(w, x.dtype)
  y = jnp.dot(x, matrix, preferred_element_type=_sums(dtype))
  return y.astype(dtype)


def _sums(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


def _forward(x, w, backend, activations, config, interpret):
  return _product(x, w, backend, activations, config, interpret), w


def _backward(backend, activations, config, interpret, w, dy):
  del activations

  def on_tpu(dy, w):
    return tpu.input_gradient(dy, w, config or Config(), interpret)

  def on_gpu(dy, w):
    return gpu.input_gradient(dy, w, config, interpret)

  def plain(dy, w):
    matrix = planar.dense(w, dy.dtype)
    dx = jnp.dot(dy, matrix.T, preferred_element_type=_sums(dy.dtype))
    return dx.astype(dy.dtype)

  return _choose(backend, on_tpu, on_gpu, plain, dy, w), None


_product.defvjp(_forward, _backward)
