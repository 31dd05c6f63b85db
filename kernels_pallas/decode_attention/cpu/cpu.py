"""One new token a row against its cache, by `cpu_decode.cc`, on CPUs.

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
"""The name by which compiled programs call the library."""

LIBRARY = Library(
  name="decoding",
  source=pathlib.Path(__file__).with_name("cpu_decode.cc"),
  parts=(
    "cpu_problem.h",
    "cpu_lanes.h",
    "cpu_decode.inc",
    "../../common/cpu_isa.h",
    "../../common/cpu_tasks.h",
    "../../common/cpu_vector.inc",
  ),
  targets=((TARGET, "HeptadDecoding"),),
  without="decoding: {error}; XLA attends, by a dozen kernels a layer.",
)

NO_PAGES = "the CPU kernel reads caches, no pages"

LANES = 16
"""Head dims are a multiple: numbers of a vector of AVX-512."""


def available() -> bool:
  """Whether the library is there; compiles it at first, warns once if not."""
  return cpu_library.available(LIBRARY)


def refused(dtype: Any, held: Any, precision: Any) -> str | None:
  """Why the kernel cannot run a call, or None.

  Args:
    dtype: Of the queries.
    held: Keys and values, or their shapes; None for a `Cache` that it takes.
    precision: Of the matmuls.
  """
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"the CPU kernel does not compute in {dtype}"
  if precision not in FULL:
    return f"the CPU kernel has no precision {precision!r}"
  if held is None:
    return None
  if not isinstance(held, Cache):
    return NO_PAGES
  if found := [x.dtype for x in (held.k, held.v) if x.dtype != dtype]:
    return f"the CPU kernel takes one dtype, found {dtype} and {found[0]}"
  if found := [n for x in (held.k, held.v) if (n := x.shape[-1]) % LANES]:
    return f"the CPU kernel takes head dims of whole {LANES}s, found {found[0]}"
  return None


def cpu_decode(
  spec: Spec,
  q: Float[Array, "B N H"],
  held: Cache | Pages,
  lengths: Int[Array, " B"],
  isa: str = "auto",
) -> tuple[Float[Array, "B N Hv"], Float[Array, "B N"]]:
  """The output and natural log-sum-exp of every row's token, in float32.

  A row's result depends on what the row holds alone: not on other rows, nor
  on room behind its tokens, nor on the number of threads.

  Args:
    spec: Static part.
    q: Queries.
    held: Keys and values, not in pages.
    lengths: Tokens of each row, the new one included.
    isa: Of `ISAS`; "auto" is the best that the running CPU has.

  Raises:
    ValueError: What the kernel does not compute, or there is no compiler.
  """
  if reason := refused(q.dtype, held, spec.precision):
    raise ValueError(f"cpu: {reason}; backend='xla' takes it")
  if not available():
    raise ValueError("backend: cpu needs a C++ compiler, xla none")
  (B, N, _), V = q.shape, held.v.shape[-1]
  arrays, results = target_platform.alike(
    (q, held.k, held.v, lengths), ((B, N, V), (B, N))
  )
  return jax.ffi.ffi_call(TARGET, tuple(results), vmap_method="broadcast_all")(
    *arrays,
    scale=np.float32(spec.scale),
    softcap=np.float32(spec.softcap or 0),
    window=np.int64(spec.window or 0),
    isa=isa,
  )
