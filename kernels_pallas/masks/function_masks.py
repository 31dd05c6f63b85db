"""Masks defined by a function, compiled to intervals of visible keys.

`function(q, k)` returns whether query position q may attend to key position k,
like FlexAttention's `mask_mod`. Kernels do not trace the function. Before the
program runs it is evaluated on every pair, a batch of queries at a time, and
the visible keys of each query are stored as intervals. A kernel compares
coordinates with these, as for every other mask, and tiles are classified
exactly. Kernels do not support a mask that needs more than `MAX_INTERVALS`
intervals for a query (every third key, say); the blockwise backend then
evaluates the function tile by tile.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

MAX_INTERVALS = 8
"""Intervals per query that kernels support; each costs one comparison."""

_PAIRS = 2**24  # evaluated at a time

Window = tuple[int | None, int | None]
"""Keys visible to the left and right of the query; None is unbounded."""


class KeyIntervals(NamedTuple):
  """The visible keys of each query, as NumPy arrays of interval bounds.

  Attributes:
    lo: int32 [R, n], first key of each of R intervals.
    hi: int32 [R, n], one past the last key; 0 for an unused interval.
    exact: Whether the intervals are exactly the visible keys. If not, there is
      one interval per query, from its first to its last visible key.
  """

  lo: np.ndarray
  hi: np.ndarray
  exact: bool

  def bounds(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates over (lo, hi) of each interval, for all queries."""
    return zip(self.lo, self.hi, strict=True)

  def hull(self, start: int, stop: int) -> tuple[int, int]:
    """Returns bounds [lo, hi) on the keys that queries [start, stop) see."""
    lo, hi = self.lo[:, start:stop], self.hi[:, start:stop]
    some = hi > 0
    return (int(lo[some].min()), int(hi.max())) if some.any() else (0, 0)


@functools.lru_cache(maxsize=16)
def key_intervals(
  function: Callable[..., Any],
  window: Window,
  first: int,
  n: int,
  keys: int,
) -> KeyIntervals:
  """Returns the intervals of keys [0, keys) that each query sees.

  Args:
    function: The mask's function; the cache keeps it and its closure alive.
    window: The mask's (left, right).
    first: Position of the first query; key 0 is at position 0.
    n: Number of queries, at positions first to first + n - 1.
    keys: Number of keys.

  Raises:
    ValueError: The function does not return booleans of the pairs' shape, or
      depends on values that are known only while the program runs.
  """
  found, exact = [], True
  for seen in _rows(function, window, first, n, keys):
    edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = (np.nonzero(edges == sign) for sign in (1, -1))
    count = np.bincount(starts[0], minlength=len(seen))
    exact &= int(count.max(initial=0)) <= MAX_INTERVALS
    found.append((count, starts, stops))
  wide = max((int(c.max(initial=0)) for c, _, _ in found), default=0)
  wide = max(wide, 1) if exact else 1
  bounds = np.zeros((2, wide, n), np.int32)
  at = 0
  for count, starts, stops in found:
    rows = slice(at, at + len(count))
    for bound, edges, pick in zip(
      bounds, (starts, stops), (0, -1), strict=True
    ):
      _place(bound[:, rows], count, edges, None if exact else pick)
    at += len(count)
  return KeyIntervals(*bounds, exact)


@functools.lru_cache(maxsize=16)
def count_visible_pairs(
  function: Callable[..., Any],
  window: Window,
  first: int,
  sizes: tuple[int, int],
  tile: tuple[int, int],
) -> np.ndarray:
  """Counts the visible pairs of each tile, int [tiles of T, tiles of S].

  For masks with too many intervals for `key_intervals`; evaluates all pairs
  again.

  Args:
    function: As in `key_intervals`.
    window: As in `key_intervals`.
    first: As in `key_intervals`.
    sizes: (T, S).
    tile: (queries, keys) per tile.
  """
  (T, S), (bq, bk) = sizes, tile
  counts, at = np.zeros((T, -(-S // bk)), np.int64), 0
  for seen in _rows(function, window, first, T, S):
    wide = np.pad(seen, ((0, 0), (0, -S % bk)))
    counts[at : at + len(seen)] = wide.reshape(len(seen), -1, bk).sum(-1)
    at += len(seen)
  return np.add.reduceat(counts, np.arange(0, T, bq), axis=0)


def evaluate(function: Callable[..., Any], q: Any, k: Any) -> Any:
  """Evaluates the mask function on positions q and k, which broadcast.

  Raises:
    ValueError: The result is not boolean, or not of the pairs' shape.
  """
  try:
    seen = function(q, k)
  except jax.errors.TracerArrayConversionError as error:
    raise ValueError(
      "mask function: it indexes a NumPy array with traced positions, expected"
      " a JAX array, as in jnp.asarray(table)[q]"
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
  """Yields visibility as booleans [some queries, keys], in order."""
  left, right = window
  k = np.arange(keys, dtype=np.int32)[None]
  step = max(1, _PAIRS // max(keys, 1))
  for start in range(0, n, step):
    q = first + np.arange(start, min(start + step, n), dtype=np.int32)[:, None]
    try:
      with jax.ensure_compile_time_eval():
        seen = np.asarray(evaluate(function, q, k))
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
  """Writes the edges of all intervals, or of the first or last, to `bound`."""
  rows, columns = edges
  first = np.cumsum(count) - count
  if pick is None:
    bound[np.arange(len(rows)) - first[rows], rows] = columns
    return
  some = np.nonzero(count)[0]
  at = first[some] if pick == 0 else first[some] + count[some] - 1
  bound[0, some] = columns[at]
