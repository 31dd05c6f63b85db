"""Packing under two budgets: tokens of a row, and views of a few rows.

An item takes tokens of one row, and views of the pool that the row is in. A
pool is a fixed number of rows that share a budget of views. Without views, and
with pools of one row, this is `packing.best_fit` of documents that fit.
"""

from collections.abc import Callable

import numpy as np

from research.typing import Int

Pool = list[list[int]]
"""The items of each row, by number."""

Packing = Callable[
  [Int[np.ndarray, " items"], Int[np.ndarray, " items"], int, int, int],
  list[Pool],
]
"""(tokens of each item, views of each item, tokens of a row, views of a pool,
rows of a pool) -> the pools; every item is in one of them."""

WINDOW = 4096
"""Items that are packed at a time: the cost of each grows with the number of
rows that it might go to."""


def best_fit(
  tokens: Int[np.ndarray, " items"],
  views: Int[np.ndarray, " items"],
  length: int,
  budget: int,
  rows: int = 1,
) -> list[Pool]:
  """Returns pools by best fit, the largest items first.

  An item goes to the row with the fewest tokens left that has room for it, in
  a pool with enough views left; only if there is none, a pool is added.

  Args:
    tokens: of each item, at most `length`.
    views: of each item, at most `budget`.
    length: tokens of a row.
    budget: views of a pool.
    rows: of a pool.
  """
  pools: list[Pool] = []
  for start in range(0, len(tokens), WINDOW):
    part = slice(start, start + WINDOW)
    found = _fit(tokens[part], views[part], length, budget, rows)
    pools += [[[start + i for i in row] for row in pool] for pool in found]
  return pools


def one_per_row(
  tokens: Int[np.ndarray, " items"],
  views: Int[np.ndarray, " items"],
  length: int,
  budget: int,
  rows: int = 1,
) -> list[Pool]:
  """Returns pools whose rows have one item; arguments as for `best_fit`."""
  return best_fit(np.full_like(tokens, length), views, length, budget, rows)


def _fit(tokens, views, length, budget, rows) -> list[Pool]:
  # At most a pool for each item.
  left, spare = np.zeros(len(tokens) * rows, int), np.zeros(len(tokens), int)
  share = np.maximum(tokens / length, views * rows / max(budget, 1))
  pools: list[Pool] = []
  for i in np.argsort(-share, kind="stable"):
    count = len(pools) * rows
    room = np.repeat(spare[: len(pools)], rows) >= views[i]
    fits = np.where(
      room & (left[:count] >= tokens[i]), left[:count], length + 1
    )
    row = int(fits.argmin()) if count else 0
    if not count or fits[row] > length:
      row, spare[len(pools)] = count, budget
      left[count : count + rows] = length
      pools.append([[] for _ in range(rows)])
    pools[row // rows][row % rows].append(int(i))
    left[row] -= tokens[i]
    spare[row // rows] -= views[i]
  return pools
