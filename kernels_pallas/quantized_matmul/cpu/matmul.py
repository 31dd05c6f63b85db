"""Matmul with packed weights in C++ (`panels.cc`): the cpu backend."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.common import cpu_library
from kernels_pallas.common.cpu_library import Library, LibraryUnavailable
from kernels_pallas.quantized_matmul.cpu.panels import Panels

TARGET = "heptad_panels"
"""FFI target name by which compiled programs call the library."""

LIBRARY = Library(
  name="panels",
  source=pathlib.Path(__file__).with_name("panels.cc"),
  includes=(
    "problem.h",
    "lanes.h",
    "tile.inc",
    "many.inc",
    "vnni.h",
    "bfloat16.h",
    "multiply.h",
    "../../common/cpu_tasks.h",
  ),
  targets=((TARGET, "HeptadPanels"),),
  warning=(
    "quantized_matmul: {error}; packed weights are multiplied by XLA, several "
    "times slower."
  ),
)

ISAS = ("auto", "vnni", "bfloat16", "avx512", "avx2", "portable")


def available() -> bool:
  """Whether the library can be used; compiles it once, warns once if not."""
  return cpu_library.available(LIBRARY)


def cpu_matmul(
  x: Float[Array, "B I"], w: Panels, isa: str = "auto"
) -> Float[Array, "B O"]:
  """Returns `x W` in the dtype of x, summed in float32.

  The order of sums depends on `W`'s shape alone, and on whether there are few,
  some or many rows: a row's result is the same for any number of threads and
  any contents of other rows.

  Args:
    x: float32 or bfloat16.
    w: without leading axes.
    isa: one of `ISAS`; "auto" is the best that the running CPU supports.

  Raises:
    Unavailable: the library cannot be used; see `available`.
  """
  if not available():
    raise LibraryUnavailable("quantized_matmul: no compiled kernel here")
  nothing = jnp.zeros((0,), jnp.float32)
  call = jax.ffi.ffi_call(
    TARGET,
    jax.ShapeDtypeStruct((x.shape[0], w.outputs), x.dtype),
    vmap_method="sequential",
  )
  return call(
    x,
    w.words,
    nothing if w.scale is None else w.scale,
    nothing if w.offset is None else w.offset,
    codebook=np.array(w.codebook or (0.0,), np.float32),
    bits=np.int64(w.bits),
    group=np.int64(w.group),
    isa=isa,
  )


def supports(dtype: Any) -> bool:
  """Whether the kernel supports activations of this dtype."""
  return dtype in (jnp.float32, jnp.bfloat16)
