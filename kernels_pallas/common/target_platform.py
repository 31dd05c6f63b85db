"""What the program is for: the device that it is lowered for, and its sums."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

AMPERE = ("A100", "A800", "A30", "A10", "A40", "RTX A", "GeForce RTX 30",
          "GeForce RTX 40", "L4", "Ada")  # fmt: skip
"""Device kinds that have `mma` of 16 bits and `cp.async`, and not `wgmma`.

"RTX 3000" and "RTX 4000" alone are Quadros of the generation before.
"""

HOPPER = ("H100", "H200", "H800", "GH200", "H20")
"""Device kinds that have `wgmma`."""

BLACKWELL = ("B100", "B200", "B300")
"""Device kinds that have `tcgen05`."""

NO_GPU_KERNELS = (
  None
  if jax.__version_info__ >= (0, 11, 2)
  else f"GPU kernels need JAX 0.11.2 or newer, found {jax.__version__}"
)
"""Why this JAX compiles none: it does not load parts of an array; or None."""

NO_TCGEN05 = (
  None
  if jax.__version_info__ >= (0, 12)
  else f"kernels for Blackwell need JAX 0.12 or newer, found {jax.__version__}"
)
"""Why this JAX compiles none for Blackwell, whose part of Pallas was young; or
None."""

LOG = logging.getLogger("kernels_pallas")
"""At level INFO it says, once each, what 'auto' took and why."""


def has_mma(kind: str) -> bool:
  """Whether a device kind is known to have `mma` of 16 bits and `cp.async`."""
  return any(name in kind for name in (*AMPERE, *HOPPER, *BLACKWELL))


def accumulator(dtype: Any) -> Any:
  """What sums are held in: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def target() -> tuple[str, str] | None:
  """Platform and kind of the devices of the mesh that is set, if one is.

  It may be a topology to compile for.
  """
  found = jax.sharding.get_abstract_mesh().abstract_device
  return None if found is None else (found.platform, found.device_kind)


def device() -> tuple[str, str]:
  """Platform and kind of the devices that the program is for.

  Those of the mesh that is set, which may be a topology to compile for, else
  the default device's.
  """
  return target() or (jax.default_backend(), jax.devices()[0].device_kind)


def place_of(arrays: Iterable[Any]) -> tuple[str, str]:
  """Platform and kind of the device that a call without `jit` runs on.

  That of an array which is committed to its device, if one is, else of the
  first; without arrays (of NumPy's, say) the default device's.

  Args:
    arrays: All that the call is given.
  """
  placed = [x for x in arrays if isinstance(x, jax.Array)]
  placed.sort(key=lambda x: not x.committed)
  found = placed[0].devices() if placed else jax.devices()
  one = next(iter(found))
  return one.platform, one.device_kind


def kind_of(platform: str) -> str:
  """The kind of device of a program that is lowered for `platform`.

  That of the device at hand, where it is of the platform. Else no kind is
  known: a GPU is then taken for a Hopper, as JAX does when it lowers a kernel
  without one, and of a TPU nothing is assumed.

  Args:
    platform: 'tpu', 'cuda', ..., as of `lowering_platforms`.
  """
  here = jax.default_backend()
  if platform == here or (platform, here) == ("cuda", "gpu"):
    return jax.devices()[0].device_kind
  return f"{HOPPER[0]} (none is here)" if platform == "cuda" else "unknown"


@functools.cache
def say(what: str, platform: str, backend: str, why: str) -> None:
  """Logs what 'auto' took, once in a process for each reason.

  Args:
    what: Which operation.
    platform: That the program is for.
    backend: Taken.
    why: The reason.
  """
  LOG.info("%s: auto is %s on %s: %s", what, backend, platform, why)


def free_axes() -> dict[str, int]:
  """Returns the sizes of the set mesh's axes that no `shard_map` goes over."""
  mesh = jax.sharding.get_abstract_mesh()
  manual = set(mesh.manual_axes)
  return {k: v for k, v in mesh.shape.items() if k not in manual}


def is_cut() -> bool:
  """Whether a mesh is set that has several devices, here, to cut arrays over.

  Inside a `shard_map` over all of its axes it has not.
  """
  return math.prod(free_axes().values()) > 1


def alike(
  arrays: Sequence[Any], shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[Any, ...], list[jax.ShapeDtypeStruct]]:
  """What a foreign function is called with under a `shard_map`.

  JAX asks that its operands differ between devices along the same axes of the
  mesh, and does not say of results that they do.

  Args:
    arrays: Of the call.
    shapes: Of its results, in float32.

  Returns:
    The arrays, differing along all axes that any of them does, and what the
    results are.
  """
  axes = frozenset().union(*map(_differs_along, arrays))
  if not axes:
    return tuple(arrays), [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

  arrays = tuple(spread(x, arrays) for x in arrays)
  results = jax.eval_shape(
    lambda x: [jnp.full_like(x, 0, jnp.float32, shape) for shape in shapes],
    arrays[0],
  )
  return arrays, results


def spread(y: jax.Array, like: Iterable[Any]) -> jax.Array:
  """`y`, differing between devices along all axes that any of `like` does.

  Within a GPU kernel's call JAX asks for no such types, and gives none.

  Args:
    y: A result under a `shard_map`, or not under one.
    like: What it was computed of.
  """
  axes = frozenset().union(*map(_differs_along, like)) - _differs_along(y)
  return jax.lax.pcast(y, tuple(sorted(axes)), to="varying") if axes else y


def _differs_along(x: Any) -> frozenset[str]:
  """Axes of the mesh along which devices hold different values."""
  found = jax.typeof(x)
  if hasattr(found, "mat"):  # since JAX 0.12
    return frozenset(found.mat.varying)
  return frozenset(getattr(found, "vma", ()))
