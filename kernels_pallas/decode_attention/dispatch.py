"""Which backend of decoding 'auto' takes.

Under a mesh, which knows its devices and may be a topology to compile for,
that is decided at once, and so it is without `jit`, by where the arrays are;
else when the call is lowered, by the platform that it is lowered for.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import target_platform
from kernels_pallas.common.by_platform import by_platform
from kernels_pallas.decode_attention import cpu
from kernels_pallas.decode_attention.gpu.mosaic_gpu import refused
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.ragged import Rows
from kernels_pallas.decode_attention.work import Cache

BACKENDS = ("auto", "reference", "xla", "cpu", "mosaic_tpu", "mosaic_gpu")

CACHE = 16
"""Of which a TPU's cache holds a multiple of tokens: rows of a register of
bfloat16."""

PLATFORMS = ("tpu", "cuda", "cpu")
"""That have a kernel, as lowering calls them."""


def choose(
  dtype: Any, size: int | None = None, held: Cache | Pages | None = None
) -> tuple[str, str]:
  """What backend 'auto' stands for by what is known of a call, and why.

  The platform is that of the mesh that is set, which may be a topology to
  compile for, else that of the default device.

  Args:
    dtype: Of the queries.
    size: Tokens that a row's cache holds; None for pages, which have to fit.
    held: Keys and values, or their shapes; None for any, of the head dims and
      dtypes that the device's kernel takes.
  """
  return _ready(*_choice(target_platform.device(), dtype, size, held))


def automatic(
  attend: Callable[..., Any], q: Any, held: Cache | Pages, rows: Rows,
  precision: Any,
) -> Any:  # fmt: skip
  """What `attend(backend, place, q, held, rows)` gives for the right backend.

  Args:
    attend: Runs a backend on a device, which is (platform, kind).
    q: Queries.
    held: Keys and values.
    rows: Whose tokens they are.
    precision: Of the matmuls.
  """
  size = held.size if rows.table is None else None

  def choice(place):
    if place[0] == "cpu" and target_platform.is_cut():
      return "xla", "XLA would gather what a mesh cuts; a shard_map would not"
    return _choice(place, q.dtype, size, held, precision)

  known = target_platform.target()
  arrays = jax.tree.leaves((q, vars(held), vars(rows)))
  if known is None and not any(isinstance(x, jax.core.Tracer) for x in arrays):
    # Nothing is lowered later: the call runs now, where its arrays are.
    known = target_platform.place_of(arrays)
  # The CPU's kernel has the gradients, and the FLOPs, of what stands for it.
  if known is not None and known[0] != "cpu":
    backend, why = choice(known)
    target_platform.say("decoding", known[0], backend, why)
    return attend(backend, known, q, held, rows)
  places = {name: (name, target_platform.kind_of(name)) for name in PLATFORMS}
  found = {name: choice(place) for name, place in places.items()}

  def runs(backend, place):
    def run(q, held, rows):
      whole = held if isinstance(held, Pages) else Cache(*held)
      return attend(_ready(backend)[0], place, q, whole, Rows(*rows))

    return run

  def note(platform):
    chosen = found.get(platform, ("xla", "it has no kernel yet"))
    target_platform.say("decoding", platform, *_ready(*chosen))

  return by_platform(
    runs("xla", ("cpu", "")),
    {
      name: runs(backend, places[name])
      for name, (backend, _) in found.items()
      if backend != "xla"
    },
    q,
    (held.k, held.v) if isinstance(held, Cache) else held,
    (rows.table, rows.kv_lens, rows.starts),
    note=note,
  )


def _ready(name: str, why: str = "") -> tuple[str, str]:
  """A choice as it turns out where the program is made: with a compiler?"""
  if name == "cpu" and not cpu.available():
    return "xla", "no C++ kernel can be compiled here"
  return name, why


def _choice(place, dtype, size, held=None, precision=None) -> tuple[str, str]:
  platform, kind = place
  if platform in ("cuda", "gpu"):
    reason = refused(kind, dtype, held, precision)
    if reason is not None:
      return "xla", reason
    return "mosaic_gpu", f"the program is for {kind}"
  if platform == "cpu":
    if size is None:
      return "xla", cpu.NO_PAGES
    reason = cpu.refused(dtype, held, precision)
    return ("xla", reason) if reason else ("cpu", "the program is for a CPU")
  if platform != "tpu":
    return "xla", f"there is no kernel for platform {platform} yet"
  if dtype not in (jnp.bfloat16, jnp.float32):
    return "xla", f"TPU kernels do not compute in {dtype}"
  if size is not None and size % CACHE:
    return "xla", f"TPU kernels take caches of multiples of {CACHE} tokens"
  return "mosaic_tpu", "the program is for a TPU"
