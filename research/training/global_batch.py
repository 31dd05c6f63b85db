"""Global batches: assembles each process's rows into global arrays.

A batch is a global array over all devices of all processes. Each process reads
only the rows of its own devices. The position in the data is the same for all
processes, so a run can resume with another number of processes.
"""

import math
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.sharding import spec_axes
from research.training.objectives.objective import PER_ROW, Batch
from research.typing import UserError


def share(sharding: NamedSharding | None) -> tuple[int, int]:
  """Returns `(i, n)`: this process has the i-th of n equal parts of the rows.

  Returns `(0, 1)`, all rows, if the mesh scatters this process's rows.
  """
  if sharding is None or jax.process_count() == 1:
    return 0, 1
  pieces = _pieces(sharding, 0)
  rows = array_sharding(sharding, (pieces,))
  local = {
    piece
    for (index,) in rows.addressable_devices_indices_map((pieces,)).values()
    for piece in range(*index.indices(pieces))
  }
  return equal_part(local, pieces)


def equal_part(local: Set[int], pieces: int) -> tuple[int, int]:
  """Returns `(i, n)`: `local` is the i-th of n equal parts of `range(pieces)`.

  Returns `(0, 1)` if it is no such part.
  """
  first, count = min(local), len(local)
  if max(local) - first + 1 != count or first % count or pieces % count:
    return 0, 1
  return first // count, pieces // count


def array_sharding(
  sharding: NamedSharding, shape: tuple[int, ...], name: str = "tokens"
) -> NamedSharding:
  """Adapts `sharding` of `[B, T]` to a batch array of `shape`.

  Axes after the first that the mesh does not divide stay unsharded, as do all
  of those of an array in `PER_ROW`.

  Raises:
    UserError: the mesh does not divide the rows.
  """
  ndim = len(shape)
  axes = [cut or None for cut in spec_axes(sharding.spec, ndim)[:ndim]]
  if shape[0] % _pieces(sharding, 0):
    what = "batch_size" if name == "tokens" else f"batch: {name}"
    raise _does_not_divide(sharding, shape[0], what)
  for i, dim in enumerate(shape):
    if dim % _pieces(sharding, i) or (i and name in PER_ROW):
      axes[i] = None
  return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def check_rows(sharding: NamedSharding | None, rows: int) -> None:
  """Raises UserError if the mesh does not divide a batch of so many rows.

  Args:
    rows: rows of all processes, B.
  """
  if sharding is not None and rows % _pieces(sharding, 0):
    raise _does_not_divide(sharding, rows, "batch_size")


def _does_not_divide(
  sharding: NamedSharding, rows: int, what: str
) -> UserError:
  axes = spec_axes(sharding.spec, 1)[0]
  sizes = {axis: sharding.mesh.shape[axis] for axis in axes}
  cut = " and ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
  return UserError(
    f"{what}: found {rows} rows, expected a multiple of"
    f" {_pieces(sharding, 0)}: the mesh has {cut}.\nSet another BATCH, or"
    " another mesh."
  )


def _pieces(sharding: NamedSharding, i: int) -> int:
  axes = spec_axes(sharding.spec, i + 1)[i]
  return math.prod(sharding.mesh.shape[a] for a in axes)


def to_global(
  batch: Batch, sharding: NamedSharding | None, parts: int = 1
) -> dict[str, Any]:
  """Returns a batch as global sharded arrays.

  Args:
    batch: host arrays `[B / parts, ...]`.
    sharding: sharding of arrays `[B, T]`; None returns the batch unchanged.
    parts: number of equal parts of the rows among processes, see `share`.
  """
  if sharding is None:
    return dict(batch)

  def one(name: str, x: Any) -> jax.Array:
    x = np.asarray(x)
    shape = (x.shape[0] * parts, *x.shape[1:])
    cut = array_sharding(sharding, shape, name)
    if jax.process_count() == 1:
      return jax.device_put(x, cut)
    return jax.make_array_from_process_local_data(cut, x, shape)

  return {name: one(name, x) for name, x in batch.items()}


def abstract(
  batch: Mapping[str, jax.ShapeDtypeStruct],
  sharding: NamedSharding | None,
  parts: int = 1,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of `to_global` of a batch of these shapes."""

  def one(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if sharding is None:
      return jax.ShapeDtypeStruct(x.shape, dtype)
    shape = (x.shape[0] * parts, *x.shape[1:])
    where = array_sharding(sharding, shape, name)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  return {name: one(name, x) for name, x in batch.items()}


def to_global_batches(
  batches: Iterator[Batch], sharding: NamedSharding | None
) -> Iterator[Batch]:
  """Converts batches to the input of a compiled step.

  A single process passes host arrays unchanged: the compiled step transfers
  them to the devices faster than Python could.
  """
  if jax.process_count() == 1:
    return batches
  _, parts = share(sharding)
  return (to_global(batch, sharding, parts) for batch in batches)
