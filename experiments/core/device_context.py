"""The devices of an experiment: one, or a mesh of many."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from research import sharding
from research.sharding import Layout, Shardings
from research.training import global_batch
from research.training.state import Placement
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceContext:
  """A mesh, and the shardings of arrays on it.

  Attributes:
    layout: which axes of arrays are cut along which axis of the mesh.
    mesh: None on one device, where arrays need no sharding.
    counts: pieces of the model's axes that are not cut, see
      `sharding.head_counts`.
  """

  layout: Layout = dataclasses.field(default_factory=lambda: Layout(data=1))
  mesh: Mesh | None = None
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def for_model(self, model: Any) -> "DeviceContext":
    """Returns the context for `model`, whose heads are not cut."""
    return dataclasses.replace(self, counts=sharding.head_counts(model))

  @property
  def placement(self) -> Placement | None:
    """Tree -> shardings of its arrays; None on one device."""
    return None if self.mesh is None else self.shardings

  def shardings(self, tree: Any) -> Shardings:
    """Returns a sharding for each array of `tree`, or of its shapes."""
    return self.layout.shardings(tree, self.mesh, self.counts)

  def undivided(self, tree: Any) -> list[str]:
    """Returns paths of arrays that the mesh does not divide."""
    return self.layout.undivided(tree, self.mesh, self.counts)

  @property
  def batch(self) -> NamedSharding | None:
    """The sharding of batches `[B, T]`; None on one device."""
    return None if self.mesh is None else self.layout.batch(self.mesh)

  @property
  def share(self) -> tuple[int, int]:
    """`(i, n)`: this process reads the i-th of n equal parts of each batch."""
    return global_batch.share(self.batch)

  def describe(self) -> str:
    """Returns the mesh in a few words."""
    if self.mesh is None:
      return f"one {jax.default_backend()} device"
    sizes = [f"{k} {n}" for k, n in self.mesh.shape.items() if n > 1]
    processes = jax.process_count()
    several = f" in {processes} processes" if processes > 1 else ""
    return (
      f"{self.mesh.size} {jax.default_backend()} devices{several}:"
      f" {' x '.join(sizes)}"
    )


def current(layout: Layout) -> DeviceContext:
  """Returns the context of `layout` on the mesh that is set, if one is."""
  mesh = jax.sharding.get_mesh()
  return DeviceContext(layout=layout, mesh=None if mesh.empty else mesh)


@contextlib.contextmanager
def on_mesh(layout: Layout) -> Iterator[DeviceContext]:
  """Sets the mesh of `layout` for all computation inside.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  try:
    mesh = layout.mesh()
  except UserError as error:
    if jax.default_backend() != "cpu":
      raise
    hint = "On a CPU, --devices=N emulates N devices."
    raise UserError(f"{error}\n{hint}") from error
  if mesh.size == 1 and jax.process_count() == 1:
    yield DeviceContext(layout=layout)
    return
  with jax.set_mesh(mesh):
    yield DeviceContext(layout=layout, mesh=mesh)


def gather(tree: Any) -> Any:
  """Returns `tree` with arrays that this process can read whole.

  Every process has to call it; arrays that are sharded over several processes
  are gathered into the memory of each.
  """

  def one(x: Any) -> Any:
    if x.is_fully_addressable or x.is_fully_replicated:
      return x
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(one, tree)
