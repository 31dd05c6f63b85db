"""Ragged batches: rows of different lengths in one array of tokens."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels_pallas.common import arguments


@dataclasses.dataclass(frozen=True)
class RaggedRows:
  """Sequences, their new tokens and their KV memory.

  Attributes:
    table: int32 [R, W], pages of each row, or None if row r of a cache belongs
      to row r.
    kv_lens: int32 [R], tokens of each row, including the new ones.
    starts: int32 [R + 1], where each row's new tokens start, and where the last
      row's end.
  """

  table: Any
  kv_lens: Any
  starts: Any


def make_rows(
  tokens: int,
  table: Any,
  kv_lens: Any,
  starts: Any,
  memory: tuple[int, int],
  window: int | None = None,
) -> RaggedRows:
  """Builds rows, checking values that are known before the program runs.

  Only table entries that are read need to be valid pages.

  Args:
    tokens: T, new tokens of all rows, including padding at the end.
    table: int [R, W], or None if row r of a cache belongs to row r.
    kv_lens: int [R].
    starts: int [R + 1], or None for one token per row.
    memory: (number of pages, tokens per page); without a table, (rows, tokens
      per row) of the cache.
    window: Most keys that a query sees, including its own, or None.

  Raises:
    ValueError: Shapes do not match, or rows need memory that does not exist.
  """
  for name, x, rank in (
    ("kv_lens", kv_lens, 1), ("table", table, 2), ("cu_q_lens", starts, 1),
  ):  # fmt: skip
    if x is None:
      continue
    if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"{name}: found {x.dtype} {x.shape}, expected integers, {rank} axes"
      )
  R = kv_lens.shape[0]
  if R < 1 or tokens < 1:
    raise ValueError(f"rows: found {R} rows, {tokens} tokens, expected some")
  if table is not None and (table.shape[0] != R or table.shape[1] < 1):
    raise ValueError(
      f"table: found {table.shape} for {R} rows of kv_lens, expected [{R}, W]"
    )
  if starts is None and tokens != R:
    raise ValueError(
      f"cu_q_lens: missing; without it expected a token for each of {R} rows, "
      f"found {tokens}"
    )
  if starts is not None and starts.shape != (R + 1,):
    raise ValueError(
      f"cu_q_lens: found {starts.shape}, expected {(R + 1,)}: a start for each "
      "row, and the end"
    )
  starts = np.arange(R + 1) if starts is None else starts
  room = memory[1] * (1 if table is None else table.shape[1])
  known = (_known(x) for x in (table, kv_lens, starts))
  _check(tokens, *known, (*memory, room), window)
  arrays = (
    None if x is None else jnp.asarray(x, jnp.int32)
    for x in (table, kv_lens, starts)
  )
  return RaggedRows(*arrays)


def token_positions(
  x: RaggedRows, tokens: int
) -> tuple[Int[Array, " T"], Int[Array, " T"], Bool[Array, " T"]]:
  """Returns each token's row and position, and whether it belongs to a row.

  The last new token of a row is at position kv_len - 1, so the t-th of q_len is
  at kv_len - q_len + t.

  Args:
    x: The rows.
    tokens: T.
  """
  t = jnp.arange(tokens)
  row = count_ends(x.starts[1:], t)
  live = row < x.kv_lens.shape[0]
  row = jnp.minimum(row, x.kv_lens.shape[0] - 1)
  position = x.kv_lens[row] - x.starts[row + 1] + t
  return row, position, live & (t >= x.starts[0])


def count_ends(
  ends: Int[Array, " R"], at: Int[Array, " T"]
) -> Int[Array, " T"]:
  """Counts the ends, which are sorted, that are at or before each position.

  Compares all pairs: cheap next to attention, and no loop. It avoids the
  primitive of `jnp.searchsorted`, which `by_platform` cannot keep in a jaxpr.
  """
  return jnp.sum(ends[:, None] <= at, axis=0, dtype=jnp.int32)


def _check(tokens, table, lens, starts, memory, window) -> None:
  """Raises ValueError for invalid values; None is not known."""
  pages, size, room = memory
  if starts is not None:
    new = np.diff(starts)
    for row in np.flatnonzero(new < 0)[:1]:
      raise ValueError(
        f"cu_q_lens: row {row} starts at {starts[row]} and ends at "
        f"{starts[row + 1]}, expected nondecreasing starts"
      )
    if starts[0] < 0 or starts[-1] > tokens:
      raise ValueError(
        f"cu_q_lens: found {starts[0]} to {starts[-1]}, expected them within "
        f"the {tokens} tokens"
      )
  if lens is None:
    return
  for row in np.flatnonzero((lens < 0) | (lens > room))[:1]:
    raise ValueError(
      f"kv_lens: row {row} has {lens[row]} tokens, expected 0 to {room}, which "
      "is what its memory holds"
    )
  if starts is None:
    return
  for row in np.flatnonzero((new > lens) & (lens > 0))[:1]:
    raise ValueError(
      f"kv_lens: row {row} has {lens[row]} tokens, {new[row]} of them new; "
      "expected kv_lens to count the new ones (or 0, for padding)"
    )
  if table is None:
    return
  first = np.zeros_like(lens)
  if window is not None:
    first = np.maximum(lens - new - window + 1, 0) // size
  column = np.arange(table.shape[1])
  read = (column >= first[:, None]) & (column * size < lens[:, None])
  read &= (new > 0)[:, None]
  for row, place in np.argwhere(read & ((table < 0) | (table >= pages)))[:1]:
    raise ValueError(
      f"table: row {row} has page {table[row, place]} for its tokens from "
      f"{place * size} on, expected 0 to {pages - 1}"
    )


def _known(x) -> np.ndarray | None:
  """Returns the values, or None if they are traced or on other hosts."""
  if x is None or not arguments.has_values(x):
    return None
  # Differences of unsigned integers would never be negative.
  return np.asarray(x).astype(np.int64)
