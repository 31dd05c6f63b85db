"""What the program is for: the device that it is lowered for, and its sums."""

import math
from typing import Any

import jax
import jax.numpy as jnp

HOPPER = ("H100", "H200", "H800", "GH200", "H20")
"""Device kinds that have `wgmma`."""


def accumulator(dtype: Any) -> Any:
  """What sums are held in: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def device() -> tuple[str, str]:
  """Platform and kind of the devices that the program is for.

  Those of the mesh that is set, which may be a topology to compile for, else
  the default device's.
  """
  found = jax.sharding.get_abstract_mesh().abstract_device
  if found is not None:
    return found.platform, found.device_kind
  return jax.default_backend(), jax.devices()[0].device_kind


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
