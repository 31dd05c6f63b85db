"""The target device of a program, what it supports, and mesh axes."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

AMPERE = ("A100", "A800", "A30", "A10", "A40", "RTX A", "GeForce RTX 30",
          "GeForce RTX 40", "L4", "Ada")  # fmt: skip
"""Device kinds with 16-bit `mma` and `cp.async`, but without `wgmma`.

"RTX 3000" and "RTX 4000" alone would match Quadros of the Turing generation.
"""

HOPPER = ("H100", "H200", "H800", "GH200", "H20")
"""Device kinds with `wgmma`."""

BLACKWELL = ("B100", "B200", "B300")
"""Device kinds with `tcgen05`."""

NO_GPU_KERNELS = (
  None
  if jax.__version_info__ >= (0, 11, 2)
  else f"GPU kernels need JAX 0.11.2 or newer, found {jax.__version__}"
)
"""Why this JAX cannot compile GPU kernels (no partial loads), or None."""

NO_TCGEN05 = (
  None
  if jax.__version_info__ >= (0, 12)
  else f"kernels for Blackwell need JAX 0.12 or newer, found {jax.__version__}"
)
"""Why this JAX cannot compile kernels for Blackwell, or None; Pallas' support
for them was incomplete before."""

LOG = logging.getLogger("kernels_pallas")
"""Logs at INFO, once per reason, which backend 'auto' takes and why."""


def has_mma(kind: str) -> bool:
  """Whether the device kind is known to have 16-bit `mma` and `cp.async`."""
  return any(name in kind for name in (*AMPERE, *HOPPER, *BLACKWELL))


def accumulator(dtype: Any) -> Any:
  """Returns the accumulation dtype: float64 for float64, else float32."""
  return jnp.promote_types(dtype, jnp.float32)


def mesh_device() -> tuple[str, str] | None:
  """Returns (platform, kind) of the current mesh's devices, or None.

  The mesh may be a topology to compile for.
  """
  found = jax.sharding.get_abstract_mesh().abstract_device
  return None if found is None else (found.platform, found.device_kind)


def program_device() -> tuple[str, str]:
  """Returns (platform, kind) of the devices that the program is for.

  These are the devices of the current mesh, which may be a topology to compile
  for; without a mesh, the default device.
  """
  return mesh_device() or (jax.default_backend(), jax.devices()[0].device_kind)


def device_of_arrays(arrays: Iterable[Any]) -> tuple[str, str]:
  """Returns (platform, kind) of the device that a call without `jit` runs on.

  That is the device of the first committed array, else of the first array;
  without JAX arrays, the default device.

  Args:
    arrays: All arguments of the call.
  """
  placed = [x for x in arrays if isinstance(x, jax.Array)]
  placed.sort(key=lambda x: not x.committed)
  found = placed[0].devices() if placed else jax.devices()
  one = next(iter(found))
  return one.platform, one.device_kind


def device_kind(platform: str) -> str:
  """Returns the device kind of a program that is lowered for `platform`.

  If a device of the platform is present, that is its kind. Otherwise a GPU is
  assumed to be a Hopper, as JAX does when it lowers a kernel without a device,
  and a TPU is 'unknown'.

  Args:
    platform: 'tpu', 'cuda', ..., as in `lowering_platforms`.
  """
  here = jax.default_backend()
  if platform == here or (platform, here) == ("cuda", "gpu"):
    return jax.devices()[0].device_kind
  return f"{HOPPER[0]} (none is here)" if platform == "cuda" else "unknown"


@functools.cache
def log_choice(what: str, platform: str, backend: str, why: str) -> None:
  """Logs which backend 'auto' takes, once in a process for each reason.

  Args:
    what: The operation.
    platform: The program's platform.
    backend: The backend taken.
    why: The reason.
  """
  LOG.info("%s: auto is %s on %s: %s", what, backend, platform, why)


def free_axes() -> dict[str, int]:
  """Returns the sizes of the mesh axes that no `shard_map` is manual over."""
  mesh = jax.sharding.get_abstract_mesh()
  manual = set(mesh.manual_axes)
  return {k: v for k, v in mesh.shape.items() if k not in manual}


def may_be_sharded() -> bool:
  """Whether arrays may be sharded here: a mesh of several devices is set.

  False inside a `shard_map` over all of the mesh's axes.
  """
  return math.prod(free_axes().values()) > 1


def match_varying_axes(
  arrays: Sequence[Any], shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[Any, ...], list[jax.ShapeDtypeStruct]]:
  """Prepares the operands and result types of an FFI call under `shard_map`.

  JAX requires all operands to vary along the same mesh axes, and does not infer
  that results do.

  Args:
    arrays: Operands of the call.
    shapes: Shapes of its results, in float32.

  Returns:
    The arrays, varying along every axis that any of them varies along, and the
    result types.
  """
  axes = frozenset().union(*map(_differs_along, arrays))
  if not axes:
    return tuple(arrays), [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

  arrays = tuple(vary_like(x, arrays) for x in arrays)
  results = jax.eval_shape(
    lambda x: [jnp.full_like(x, 0, jnp.float32, shape) for shape in shapes],
    arrays[0],
  )
  return arrays, results


def vary_like(y: jax.Array, like: Iterable[Any]) -> jax.Array:
  """Returns `y`, varying along every mesh axis that any of `like` varies along.

  Inside a GPU kernel JAX neither requires nor provides such types.

  Args:
    y: A result, inside or outside of a `shard_map`.
    like: The arrays that it was computed from.
  """
  axes = frozenset().union(*map(_differs_along, like)) - _differs_along(y)
  return jax.lax.pcast(y, tuple(sorted(axes)), to="varying") if axes else y


def _differs_along(x: Any) -> frozenset[str]:
  """Returns the mesh axes along which devices hold different values."""
  found = jax.typeof(x)
  if hasattr(found, "mat"):  # since JAX 0.12
    return frozenset(found.mat.varying)
  return frozenset(getattr(found, "vma", ()))
