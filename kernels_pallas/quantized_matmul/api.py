"""`quantized_matmul`: matmul with packed weights, the same on every backend."""

import functools
import math
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.quantized_matmul import cpu
from kernels_pallas.quantized_matmul.cpu.panels import Panels
from kernels_pallas.quantized_matmul.planar import Planar
from kernels_pallas.quantized_matmul.planar_matmul import planar_matmul
from kernels_pallas.quantized_matmul.reference import reference_matmul
from kernels_pallas.quantized_matmul.xla import xla_input_gradient, xla_matmul

BACKENDS = ("auto", "reference", "xla", "cpu", "mosaic_tpu", "mosaic_gpu")


def quantized_matmul(
  x: Float[Array, "*B I"],
  w: Panels | Planar,
  *,
  backend: str = "auto",
  activations: Any = None,
) -> Float[Array, "*B O"]:
  """Returns `x W` in the dtype of x, summed in float32.

  Differentiable in x; the backward pass saves only W, packed, and decodes it
  again. W has no gradient.

  Args:
    x: Activations, float32 or bfloat16 (reference: any; mosaic_gpu: bfloat16
      or float16).
    w: From `panels.pack` or `planar.pack`, without leading axes.
    backend: 'auto' takes the C++ kernel for `Panels` on CPU if it compiles, the
      Pallas kernels for `Planar` on TPU and GPU, and XLA otherwise; all other
      names require their kernel.
    activations: None; or int8, to which rows are rounded before a product with
      8-bit `Planar` weights (`mosaic_tpu.product`), by any backend but
      'reference'.

  Raises:
    ValueError: Shapes do not match, or the backend is unknown.
  """
  if len(w.shape) != 2 or x.ndim < 1 or x.shape[-1] != w.inputs:
    raise ValueError(
      f"quantized_matmul: found x {x.shape}, W {w.shape}; expected [..., I] "
      "and [I, O]"
    )
  if backend not in BACKENDS:
    raise ValueError(
      f"backend: found {backend!r}, available: {', '.join(BACKENDS)}"
    )
  if activations is not None and not isinstance(w, Planar):
    raise ValueError("activations: found some for panels, which round none")
  if backend == "reference":
    if activations is not None:
      raise ValueError(
        "activations: found some for 'reference', which rounds none"
      )
    return reference_matmul(x, w)
  if backend == "cpu" and not (cpu.supports(x.dtype) and cpu.available()):
    raise ValueError(
      f"backend 'cpu': needs a C++ compiler and float32 or bfloat16; found "
      f"{x.dtype}"
    )
  kernels = {"cpu": Panels, "mosaic_tpu": Planar, "mosaic_gpu": Planar}
  if not isinstance(w, kernels.get(backend, object)):
    raise ValueError(
      f"backend {backend!r}: found {type(w).__name__}, expected "
      f"{kernels[backend].__name__}"
    )
  rows = math.prod(x.shape[:-1])
  x_rows = x.reshape(rows, w.inputs)
  if isinstance(w, Panels):
    y = _product(x_rows, w, backend)
  else:
    y = planar_matmul(x_rows, w, backend, activations)
  return y.reshape(*x.shape[:-1], w.outputs)


@functools.partial(jax.custom_vjp, nondiff_argnames=("backend",))
def _product(x, w, backend):
  if backend == "cpu":
    return cpu.cpu_matmul(x, w)
  if backend == "xla" or not len(x) or not cpu.supports(x.dtype):
    return xla_matmul(x, w)

  # The platform is that of the program, which may be compiled for another one
  # than the process runs on.
  def on_cpu(x, w):
    return cpu.cpu_matmul(x, w) if cpu.available() else xla_matmul(x, w)

  return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=xla_matmul)


def _forward(x, w, backend):
  return _product(x, w, backend), w


def _backward(backend, w, dy):
  del backend
  return xla_input_gradient(dy, w), None


_product.defvjp(_forward, _backward)
