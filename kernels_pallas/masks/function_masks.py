"""Masks that a function defines, compiled to intervals of keys.

`function(q, k)` says which pairs see each other, as FlexAttention's `mask_mod`
does. Kernels trace no function: before the program runs it is asked about every
pair, some rows of queries at a time, and what each query sees is listed as
intervals. A kernel compares coordinates with those, as with any other rule, and
tiles are classified by their pairs exactly. Where a query's keys lie in more
than `MOST` intervals (every third key, say), kernels refuse, and the blockwise
backend evaluates the function a tile at a time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

MOST = 8
"""Intervals a query that kernels compare with; each costs them a comparison."""

_PAIRS = 2**24  # asked about at a time

Window = tuple[int | None, int | None]
"""Keys visible to the left and right of the query; None is unbounded."""


class Runs(NamedTuple):
  """What queries see, a row of NumPy arrays for each interval.

  Attributes:
    lo: int32 [R, n], first key.
    hi: int32 [R, n], past the last key; 0 where there is no interval.
    listed: Whether these are all that they see and nothing else. If not there
      is one interval a query, from its first to its last key.
  """

  lo: np.ndarray
  hi: np.ndarray
  listed: bool

  def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(lo, hi) of each interval, of all queries."""
    return zip(self.lo, self.hi, strict=True)

  def hull(self, start: int, stop: int) -> tuple[int, int]:
    """Bounds [lo, hi) on the keys of queries start to stop - 1."""
    lo, hi = self.lo[:, start:stop], self.hi[:, start:stop]
    some = hi > 0
    return (int(lo[some].min()), int(hi.max())) if some.any() else (0, 0)


@functools.lru_cache(maxsize=16)
def runs(
  function: Callable[..., Any],
  window: Window,
  first: int,
  n: int,
  keys: int,
) -> Runs:
  """The intervals of keys [0, keys) that queries first to first + n - 1 see.

  Args:
    function: Of a mask; it is kept, with what it closes over.
    window: Of the mask, (left, right).
    first: Position of the first query; key 0 is at 0.
    n: Queries.
    keys: Keys.

  Raises:
    ValueError: The function returns something else than booleans of the
      pairs' shape, or needs values that only the running program knows.
  """
  found, listed = [], True
  for seen in _rows(function, window, first, n, keys):
    edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = (np.nonzero(edges == sign) for sign in (1, -1))
    count = np.bincount(starts[0], minlength=len(seen))
    listed &= int(count.max(initial=0)) <= MOST
    found.append((count, starts, stops))
  wide = max((int(c.max(initial=0)) for c, _, _ in found), default=0)
  wide = max(wide, 1) if listed else 1
  bounds = np.zeros((2, wide, n), np.int32)
  at = 0
  for count, starts, stops in found:
    rows = slice(at, at + len(count))
    for bound, edges, pick in zip(
      bounds, (starts, stops), (0, -1), strict=True
    ):
      _place(bound[:, rows], count, edges, None if listed else pick)
    at += len(count)
  return Runs(*bounds, listed)


@functools.lru_cache(maxsize=16)
def tiles(
  function: Callable[..., Any],
  window: Window,
  first: int,
  sizes: tuple[int, int],
  tile: tuple[int, int],
) -> np.ndarray:
  """Visible pairs of each tile, int [tiles of T, tiles of S].

  For masks that `runs` cannot list: asks about all pairs again.

  Args:
    function: As of `runs`.
    window: As of `runs`.
    first: As of `runs`.
    sizes: (T, S).
    tile: (queries, keys).
  """
  (T, S), (bq, bk) = sizes, tile
  counts, at = np.zeros((T, -(-S // bk)), np.int64), 0
  for seen in _rows(function, window, first, T, S):
    wide = np.pad(seen, ((0, 0), (0, -S % bk)))
    counts[at : at + len(seen)] = wide.reshape(len(seen), -1, bk).sum(-1)
    at += len(seen)
  return np.add.reduceat(counts, np.arange(0, T, bq), axis=0)


def ask(function: Callable[..., Any], q: Any, k: Any) -> Any:
  """What the function says of positions, which NumPy broadcasts.

  Raises:
    ValueError: It is not boolean, or not of the pairs' shape.
  """
  try:
    seen = function(q, k)
  except jax.errors.TracerArrayConversionError as error:
    raise ValueError(
      "mask function: it looks something up in a NumPy array, expected a JAX"
      " one, as in jnp.asarray(table)[q]"
    ) from error
  if isinstance(seen, bool):
    seen = np.asarray(seen)
  wanted = np.broadcast_shapes(q.shape, k.shape)
  shape, dtype = np.shape(seen), getattr(seen, "dtype", type(seen).__name__)
  fits = len(shape) <= len(wanted) and all(
    n in (1, whole)
    for n, whole in zip(reversed(shape), reversed(wanted), strict=False)
  )
  if dtype != np.bool_ or not fits:
    raise ValueError(
      f"mask function: found {dtype} of shape {shape}, expected bool that "
      f"broadcasts to {wanted}"
    )
  return seen


def _rows(
  function, window: Window, first: int, n: int, keys: int
) -> Iterator[np.ndarray]:
  """Booleans [some rows, keys], from the first query to the last."""
  left, right = window
  k = np.arange(keys, dtype=np.int32)[None]
  step = max(1, _PAIRS // max(keys, 1))
  for start in range(0, n, step):
    q = first + np.arange(start, min(start + step, n), dtype=np.int32)[:, None]
    try:
      with jax.ensure_compile_time_eval():
        seen = np.asarray(ask(function, q, k))
    except (
      jax.errors.ConcretizationTypeError,
      jax.errors.TracerArrayConversionError,
      jax.errors.UnexpectedTracerError,
    ) as error:
      raise ValueError(
        "mask function: it closes over an array that only the running program "
        "knows; expected q, k and constants (documents go into segments)"
      ) from error
    seen = np.broadcast_to(seen, (len(q), keys))
    seen = seen & (True if left is None else k >= q - left)
    yield seen & (True if right is None else k <= q + right)


def _place(bound, count, edges, pick: int | None) -> None:
  """Writes edges, in the order of rows, to [intervals, rows]: all or one."""
  rows, columns = edges
  first = np.cumsum(count) - count
  if pick is None:
    bound[np.arange(len(rows)) - first[rows], rows] = columns
    return
  some = np.nonzero(count)[0]
  at = first[some] if pick == 0 else first[some] + count[some] - 1
  bound[0, some] = columns[at]
