"""Products with `Planar` weights: kernels for TPU and GPU, else XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.common import target_platform
from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.gpu import mosaic_gpu
from kernels_pallas.quantized_matmul.gpu.mosaic_gpu_tiling import Tile
from kernels_pallas.quantized_matmul.planar import Planar
from kernels_pallas.quantized_matmul.tpu import mosaic_tpu
from kernels_pallas.quantized_matmul.tpu.mosaic_tpu import Config

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

  Differentiable in x; the backward pass keeps only W, packed, and decodes it
  again. Its gradient is that of rows as they were before `activations`.

  A kernel is a program of one device: where a mesh is set, 'auto' takes them
  within a `shard_map` over it, and XLA, which cuts its own product, outside.

  Args:
    x: float32 or bfloat16; for GPUs bfloat16 or float16.
    w: Without leading axes.
    backend: 'mosaic_tpu', 'mosaic_gpu'; 'xla', which decodes the matrix as a
      whole; 'auto' is the kernels in programs for a TPU or a GPU (Ampere, Ada,
      Hopper, B100 to B300), else XLA; and, of many rows on the latter, XLA.
    activations: None, or int8 with 8-bit codes; see `mosaic_tpu.product`.
    config: Tiles of the kernels: `Config` of TPUs, `Tile` of GPUs.
    interpret: False to compile the kernels, or as of `pl.pallas_call`.

  Raises:
    ValueError: Types that do not fit each other.
  """
  mosaic_tpu.check_activations(activations, w)
  if jax.sharding.get_abstract_mesh().manual_axes:
    # Rows that devices share meet a part of W on each. With the type of what
    # differs, their gradients are added up behind the kernel, not in it.
    never = jnp.zeros_like(w.codes, bool, shape=())
    x = jnp.where(never, jnp.zeros((), x.dtype), x)
  return _product(x, w, backend, activations, config, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _product(x, w, backend, activations, config, interpret):
  def on_tpu(x, w):
    return mosaic_tpu.product(x, w, activations, config or Config(), interpret)

  def on_gpu(x, w):
    return mosaic_gpu.product(x, w, config, interpret, activations)

  def plain(x, w):
    return _plain(x, w, activations)

  return _choose(backend, on_tpu, on_gpu, plain, x, w, activations)


def _choose(backend, on_tpu, on_gpu, plain, x, w, activations=None):
  if backend in ("mosaic_tpu", "mosaic_gpu"):
    return (on_tpu if backend == "mosaic_tpu" else on_gpu)(x, w)
  if backend == "xla" or not len(x) or target_platform.is_cut():
    return plain(x, w)
  # The platform is that of the program, which may be compiled for another one
  # than this process runs on.
  kernels = {}
  if mosaic_tpu.unsupported(x.dtype, w) is None:
    kernels["tpu"] = on_tpu
  gpu = mosaic_gpu.is_for(len(x))
  if gpu and mosaic_gpu.unsupported(x.dtype, w, activations) is None:
    kernels["cuda"] = on_gpu
  return jax.lax.platform_dependent(x, w, **kernels, default=plain)


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
  return _product(x, w, backend, activations, config, interpret), w


def _backward(backend, activations, config, interpret, w, dy):
  del activations

  def on_tpu(dy, w):
    return mosaic_tpu.input_gradient(dy, w, config or Config(), interpret)

  def on_gpu(dy, w):
    return mosaic_gpu.input_gradient(dy, w, config, interpret)

  def plain(dy, w):
    matrix = planar.dense(w, dy.dtype)
    dx = jnp.dot(dy, matrix.T, preferred_element_type=_sums(dy.dtype))
    return dx.astype(dy.dtype)

  return _choose(backend, on_tpu, on_gpu, plain, dy, w), None


_product.defvjp(_forward, _backward)
