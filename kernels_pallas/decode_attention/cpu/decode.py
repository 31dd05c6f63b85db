"""Decode attention in C++ (`decode.cc`) for CPUs: the cpu backend.

Compiled at first use and called by XLA.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.common import cpu_library, target_platform
from kernels_pallas.common.cpu_library import Library
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.spec import Spec
from kernels_pallas.decode_attention.work import Cache
from kernels_pallas.flash_attention.cpu import FULL
from kernels_pallas.flash_attention.cpu import ISAS as ISAS

TARGET = "heptad_decoding"
"""FFI target name by which compiled programs call the library."""

LIBRARY = Library(
  name="decoding",
  source=pathlib.Path(__file__).with_name("decode.cc"),
  includes=(
    "problem.h",
    "lanes.h",
    "decode.inc",
    "../../common/cpu_isa.h",
    "../../common/cpu_tasks.h",
    "../../common/cpu_vector.inc",
  ),
  targets=((TARGET, "HeptadDecoding"),),
  warning="decoding: {error}; XLA attends, by a dozen kernels a layer.",
)

NO_PAGES = "the CPU kernel reads caches, no pages"

LANES = 16
"""Head dims are a multiple of it: the lanes of an AVX-512 vector."""


def available() -> bool:
  """Whether the library can be used; compiles it once, warns once if not."""
  return cpu_library.available(LIBRARY)


def unsupported(dtype: Any, storage: Any, precision: Any) -> str | None:
  """Returns why the kernel cannot run a call, or None.

  Args:
    dtype: Dtype of the queries.
    storage: Keys and values, or their shapes; None assumes a supported `Cache`.
    precision: Precision of the matmuls.
  """
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"the CPU kernel does not support {dtype}"
  if precision not in FULL:
    return f"the CPU kernel does not support precision {precision!r}"
  if storage is None:
    return None
  if not isinstance(storage, Cache):
    return NO_PAGES
  if found := [x.dtype for x in (storage.k, storage.v) if x.dtype != dtype]:
    return f"the CPU kernel needs one dtype, found {dtype} and {found[0]}"
  if found := [n for x in (storage.k, storage.v) if (n := x.shape[-1]) % LANES]:
    return f"the CPU kernel needs head dims of whole {LANES}s, found {found[0]}"
  return None


def cpu_decode(
  spec: Spec,
  q: Float[Array, "B N H"],
  storage: Cache | Pages,
  lengths: Int[Array, " B"],
  isa: str = "auto",
) -> tuple[Float[Array, "B N Hv"], Float[Array, "B N"]]:
  """Returns the output and natural log-sum-exp of every row, in float32.

  A row's result depends on its own contents alone: not on other rows, nor on
  unused slots after its tokens, nor on the number of threads.

  Args:
    spec: Static part.
    q: Queries.
    storage: Keys and values, not in pages.
    lengths: Tokens of each row, including the new one.
    isa: One of `ISAS`; "auto" is the best that the running CPU supports.

  Raises:
    ValueError: The kernel does not support the call, or there is no compiler.
  """
  if reason := unsupported(q.dtype, storage, spec.precision):
    raise ValueError(f"cpu: {reason}; backend='xla' takes it")
  if not available():
    raise ValueError("backend: cpu needs a C++ compiler, xla none")
  (B, N, _), V = q.shape, storage.v.shape[-1]
  arrays, results = target_platform.match_varying_axes(
    (q, storage.k, storage.v, lengths), ((B, N, V), (B, N))
  )
  return jax.ffi.ffi_call(TARGET, tuple(results), vmap_method="broadcast_all")(
    *arrays,
    scale=np.float32(spec.scale),
    softcap=np.float32(spec.softcap or 0),
    window=np.int64(spec.window or 0),
    isa=isa,
  )
