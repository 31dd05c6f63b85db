"""Global batches out of what each process reads.

A batch is one array over all devices of all processes. A process reads only
the rows that its own devices hold, and where it stands in the data is the same
for all, so that a run can go on with another number of processes.
"""

import math
from collections.abc import Iterator, Set
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.sharding import spec_axes
from research.training.objectives.objective import Batch
from research.typing import UserError


def share(sharding: NamedSharding | None) -> tuple[int, int]:
  """Returns `(i, n)`: this process holds the i-th of n equal parts of the rows.

  All of them, `(0, 1)`, where the mesh scatters its rows.

  Args:
    sharding: of a batch's arrays `[B, T]`, or None for one device.
  """
  if sharding is None or jax.process_count() == 1:
    return 0, 1
  pieces = _pieces(sharding, 0)
  rows = fitted(sharding, (pieces,))
  held = {
    piece
    for (index,) in rows.addressable_devices_indices_map((pieces,)).values()
    for piece in range(*index.indices(pieces))
  }
  return part(held, pieces)


def part(held: Set[int], pieces: int) -> tuple[int, int]:
  """Returns `(i, n)`: `held` is the i-th of n equal parts of `range(pieces)`.

  Or `(0, 1)`, all of it, where it is none.
  """
  first, count = min(held), len(held)
  if max(held) - first + 1 != count or first % count or pieces % count:
    return 0, 1
  return first // count, pieces // count


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """Returns `sharding`, that of `[B, T]`, for a batch's array of `shape`.

  Raises:
    UserError: the mesh does not divide the rows.
  """
  ndim = len(shape)
  axes = [cut or None for cut in spec_axes(sharding.spec, ndim)[:ndim]]
  if shape[0] % _pieces(sharding, 0):
    raise UserError(
      f"batch_size: found {shape[0]} rows, expected a multiple of"
      f" {_pieces(sharding, 0)}: so many parts\nthe mesh cuts them into"
      f" ({sharding.mesh.shape_tuple}, axes {axes[0]})."
    )
  for i, dim in enumerate(shape):
    if dim % _pieces(sharding, i):
      axes[i] = None
  return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _pieces(sharding: NamedSharding, i: int) -> int:
  axes = spec_axes(sharding.spec, i + 1)[i]
  return math.prod(sharding.mesh.shape[a] for a in axes)


def place(
  batch: Batch, sharding: NamedSharding | None, parts: int = 1
) -> dict[str, Any]:
  """Returns a batch as global arrays, cut as `sharding` says.

  Args:
    batch: host arrays `[B / parts, ...]`.
    sharding: of arrays `[B, T]`; None leaves the batch as it is.
    parts: into how many the processes share the rows, see `share`.
  """
  if sharding is None:
    return dict(batch)

  def one(x: Any) -> jax.Array:
    x = np.asarray(x)
    shape = (x.shape[0] * parts, *x.shape[1:])
    cut = fitted(sharding, shape)
    if jax.process_count() == 1:
      return jax.device_put(x, cut)
    return jax.make_array_from_process_local_data(cut, x, shape)

  return {name: one(x) for name, x in batch.items()}


def placed(
  batches: Iterator[Batch], sharding: NamedSharding | None
) -> Iterator[Batch]:
  """Returns batches that a compiled step takes.

  A single process hands its host arrays over as they are: the step knows where
  they belong and puts them there faster than Python could.
  """
  if jax.process_count() == 1:
    return batches
  _, parts = share(sharding)
  return (place(batch, sharding, parts) for batch in batches)
