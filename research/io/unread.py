"""Arrays that are not read yet: each device will read its own part.

An importer describes a tree of `LazyArray` arrays. `place` makes arrays of it,
on one device or, with shardings, on all those of a mesh; then the file is read
through the index of each device's shard, and nobody holds a whole array.
"""

import dataclasses
import gc
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research import progress, tree
from research.typing import UserError

Index = tuple[slice, ...]
"""One slice an axis, with its start and stop, of step 1."""

Shardings = Callable[[Any], Any]
"""From a tree of `jax.ShapeDtypeStruct`s to one of `jax.sharding.Sharding`s."""

_SMALL = 1 << 20
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array whose parts are read on demand.

  Attributes:
    shape, dtype: of all of it.
    read: returns a part of it, in `dtype`.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)

  def first(self) -> "LazyArray":
    """Returns what stands behind a leading axis of one."""
    return LazyArray(
      self.shape[1:],
      self.dtype,
      lambda index: self.read((slice(0, 1), *index))[0],
    )


Fill = Callable[[Index, np.ndarray], None]
"""Reads a part of an array into memory of its shape."""


def in_pieces(
  read: Callable[[Index], np.ndarray], axis: int = 0, nbytes: int = 0
) -> Fill:
  """Returns what reads a part of an array, a mebibyte of its file at a time.

  Pages of a file lie in memory as long as a look at them lasts: an embedding
  that becomes another type, or whose scales alone are wanted, would be there
  twice.

  Args:
    read: returns a part.
    axis: of the array, along which the file's rows are.
    nbytes: that each entry of that axis takes in the file; 0 reads all at once.
  """

  def fill(index: Index, out: np.ndarray) -> None:
    if not nbytes:
      out[...] = read(index)
      return
    rows, step = index[axis], max(1, _PIECE // nbytes)
    for start in range(rows.start, rows.stop, step):
      some = slice(start, min(start + step, rows.stop))
      to = slice(some.start - rows.start, some.stop - rows.start)
      part = read((*index[:axis], some, *index[axis + 1 :]))
      out[(*(slice(None),) * axis, to)] = part

  return fill


def stacked(
  fills: Sequence[Fill],
  lead: tuple[int, ...],
  one: tuple[int, ...],
  dtype: np.dtype,
) -> LazyArray:
  """Returns arrays of shape `one`, read one by one, behind the axes `lead`."""
  order = np.arange(len(fills)).reshape(lead)

  def read(index: Index) -> np.ndarray:
    chosen, inner = order[index[: len(lead)]], index[len(lead) :]
    out = _scratch((*chosen.shape, *sizes(inner)), dtype)
    for at in np.ndindex(*chosen.shape):
      fills[chosen[at]](inner, out[*at, ...])
    return out

  return LazyArray((*lead, *one), dtype, read)


def _scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns memory that the system has back as soon as it is not used.

  glibc keeps what `np.empty` takes once a large array has been freed. Never
  aligned to 64 bytes: JAX would then keep it, on CPUs, instead of copying it,
  and a step cannot reuse a donated array that JAX has not allocated.
  """
  size = math.prod(shape) * dtype.itemsize
  if size < _SMALL:
    room = np.empty(size + 64, np.uint8)
  else:
    room = np.frombuffer(mmap.mmap(-1, size + 64), np.uint8)
  skipped = (16 - room.ctypes.data) % 64
  return room[skipped : skipped + size].view(dtype).reshape(shape)


def sizes(index: Index) -> tuple[int, ...]:
  """Returns the shape of what an index chooses."""
  return tuple(s.stop - s.start for s in index)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree whose leaves have such paths."""
  out: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    into = out
    for parent in parents:
      into = into.setdefault(parent, {})
    into[last] = value
  return out


def abstract(params: Any) -> Any:
  """Returns shapes and types in place of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def unplaced(shapes: Any) -> Any:
  """Returns the shapes: as `Shardings`, it leaves arrays where they are.

  What would have been placed by it are then `jax.ShapeDtypeStruct`s.
  """
  return shapes


def place(unread: Any, shardings: Shardings | None = None) -> Any:
  """Returns the arrays that a tree of `LazyArray`s describes.

  The largest are read first: while an array is made it is held twice, and at
  the end, when memory is fullest, that is a small one.

  Args:
    unread: any tree.
    shardings: where its arrays go; None for the default device; `left` to read
      nothing.

  Raises:
    UserError: a file cannot be read, or an array cannot be cut that way.
  """
  leaves, treedef = jax.tree.flatten(unread)
  paths = [path for path, _ in tree.flatten_paths(unread)]
  where: Sequence[Any] = [None] * len(leaves)
  if shardings is not None:
    where = treedef.flatten_up_to(shardings(abstract(unread)))
  out: list[Any] = [None] * len(leaves)
  order = sorted(range(len(leaves)), key=lambda i: -_nbytes(leaves[i]))
  total = sum(map(_nbytes, leaves)) >> 20
  with progress.phase("reading weights, in MiB", total) as now:
    done = 0
    for i in order:
      if isinstance(where[i], jax.ShapeDtypeStruct):
        out[i] = where[i]
        continue
      out[i] = jax.block_until_ready(_placed(paths[i], leaves[i], where[i]))
      # JAX lets go of what it has copied when Python collects garbage.
      gc.collect(0)
      done += _nbytes(leaves[i])
      now.done = done >> 20
  return jax.tree.unflatten(treedef, out)


def _nbytes(x: LazyArray) -> int:
  return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _placed(path: str, x: LazyArray, sharding: jax.sharding.Sharding | None):
  if sharding is None:
    return jax.device_put(x.read(tuple(slice(0, n) for n in x.shape)))
  _divisible(path, x.shape, sharding)
  known: dict[Any, np.ndarray] = {}

  def read(index):
    # Replicas on other devices hold the same part: it is read once.
    bounds = tuple(
      slice(*s.indices(n)[:2]) for s, n in zip(index, x.shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in bounds)
    if key not in known:
      known[key] = x.read(bounds)
    return known[key]

  return jax.make_array_from_callback(x.shape, sharding, read, dtype=x.dtype)


def _divisible(path: str, shape: tuple[int, ...], sharding) -> None:
  try:
    sharding.shard_shape(shape)
  except ValueError as e:
    raise UserError(
      f"{path}: shape {list(shape)} cannot be cut as "
      f"{getattr(sharding, 'spec', sharding)} over this mesh; expected axes "
      "that its devices divide"
    ) from e


def moved(params: Any, shardings: Shardings) -> Any:
  """Returns arrays that are in memory where `shardings` wants them."""

  def one(x, sharding):
    if isinstance(sharding, jax.ShapeDtypeStruct):
      return sharding
    if sharding.is_fully_addressable or not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    host = np.asarray(x)  # each process has made the same one
    return jax.make_array_from_callback(
      x.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(one, params, shardings(abstract(params)))
