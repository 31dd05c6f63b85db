"""Which backend of decode attention 'auto' takes.

Under a mesh, which knows its devices and may be a topology to compile for, the
choice is immediate. Without `jit` it goes by the device of the arrays;
otherwise it is made when the call is lowered, by the platform.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform
from kernels_pallas.common.by_platform import by_platform
from kernels_pallas.decode_attention import cpu, gpu
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.ragged import RaggedRows
from kernels_pallas.decode_attention.work import Cache

BACKENDS = ("auto", "reference", "xla", "cpu", "mosaic_tpu", "mosaic_gpu")

CACHE_MULTIPLE = 16
"""A TPU's cache needs a multiple of this many tokens: rows of a bfloat16
register."""

PLATFORMS = ("tpu", "cuda", "cpu")
"""Platforms that have a kernel, as named in lowering."""


def choose(
  dtype: Any, size: int | None = None, storage: Cache | Pages | None = None
) -> tuple[str, str]:
  """Returns the backend that 'auto' takes for such calls, and the reason.

  The platform is that of the current mesh, which may be a topology to compile
  for, else that of the default device.

  Args:
    dtype: Dtype of the queries.
    size: Tokens per row of the cache; None for pages, whose size must fit.
    storage: Keys and values, or their shapes; None assumes head dims and dtypes
      that the device's kernel supports.
  """
  return _without_compiler(
    *_choose_for_device(target_platform.program_device(), dtype, size, storage)
  )


def resolve_auto(
  attend: Callable[..., Any], q: Any, storage: Cache | Pages, rows: RaggedRows,
  precision: Any,
) -> Any:  # fmt: skip
  """Calls `attend(backend, place, q, storage, rows)` with the right backend.

  Args:
    attend: Runs a backend on a device, (platform, kind).
    q: Queries.
    storage: Keys and values.
    rows: The rows that the tokens belong to.
    precision: Precision of the matmuls.
  """
  size = storage.size if rows.table is None else None

  def choice(place):
    if place[0] == "cpu" and target_platform.may_be_sharded():
      return "xla", "XLA would gather what a mesh cuts; a shard_map would not"
    return _choose_for_device(place, q.dtype, size, storage, precision)

  known = target_platform.mesh_device()
  arrays = jax.tree.leaves((q, vars(storage), vars(rows)))
  if known is None and not any(isinstance(x, jax.core.Tracer) for x in arrays):
    # Not traced: the call runs now, on the device of its arrays.
    known = target_platform.device_of_arrays(arrays)
  # On CPU, gradients and FLOPs are those of the default, so it is deferred.
  if known is not None and known[0] != "cpu":
    backend, why = choice(known)
    target_platform.log_choice("decoding", known[0], backend, why)
    return attend(backend, known, q, storage, rows)
  places = {
    name: (name, target_platform.device_kind(name)) for name in PLATFORMS
  }
  found = {name: choice(place) for name, place in places.items()}

  def runs(backend, place):
    def run(q, storage, rows):
      whole = storage if isinstance(storage, Pages) else Cache(*storage)
      return attend(
        _without_compiler(backend)[0], place, q, whole, RaggedRows(*rows)
      )

    return run

  def on_lowering(platform):
    chosen = found.get(platform, ("xla", "it has no kernel yet"))
    target_platform.log_choice(
      "decoding", platform, *_without_compiler(*chosen)
    )

  return by_platform(
    runs("xla", ("cpu", "")),
    {
      name: runs(backend, places[name])
      for name, (backend, _) in found.items()
      if backend != "xla"
    },
    q,
    (storage.k, storage.v) if isinstance(storage, Cache) else storage,
    (rows.table, rows.kv_lens, rows.starts),
    on_lowering=on_lowering,
  )


def _without_compiler(name: str, why: str = "") -> tuple[str, str]:
  """Replaces the C++ kernel by xla if no compiler is found."""
  if name == "cpu" and not cpu.available():
    return "xla", "no C++ kernel can be compiled here"
  return name, why


def _choose_for_device(
  place, dtype, size, storage=None, precision=None
) -> tuple[str, str]:
  platform, kind = place
  if platform in ("cuda", "gpu"):
    reason = gpu.unsupported(kind, dtype, storage, precision)
    if reason is not None:
      return "xla", reason
    return "mosaic_gpu", f"the program is for {kind}"
  if platform == "cpu":
    if size is None:
      return "xla", cpu.NO_PAGES
    reason = cpu.unsupported(dtype, storage, precision)
    return ("xla", reason) if reason else ("cpu", "the program is for a CPU")
  if platform != "tpu":
    return "xla", f"there is no kernel for platform {platform} yet"
  if dtype not in (jnp.bfloat16, jnp.float32):
    return "xla", f"TPU kernels do not support {dtype}"
  if size is not None and size % CACHE_MULTIPLE:
    return (
      "xla",
      f"TPU kernels need caches of multiples of {CACHE_MULTIPLE} tokens",
    )
  return "mosaic_tpu", "the program is for a TPU"
