"""Packing under two budgets: nothing is lost or overflows, rows are few."""

import itertools

import numpy as np
import pytest

from research.data import knapsack, packing

RNG = np.random.default_rng(0)


def drawn(count, length, budget):
  tokens = RNG.integers(1, length + 1, count)
  return tokens, RNG.integers(0, budget + 1, count)


@pytest.mark.parametrize("plan", [knapsack.best_fit, knapsack.one_per_row])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_item_is_in_one_row_and_both_budgets_hold(
  plan, rows, monkeypatch
):
  monkeypatch.setattr(knapsack, "WINDOW", 64)
  tokens, views = drawn(200, 32, 5)
  pools = plan(tokens, views, 32, 5, rows)
  flat = [i for pool in pools for row in pool for i in row]
  assert sorted(flat) == list(range(200))
  for pool in pools:
    assert len(pool) == rows
    assert sum(views[i] for row in pool for i in row) <= 5
    for row in pool:
      assert sum(tokens[row]) <= 32
      assert plan is knapsack.best_fit or len(row) <= 1


def test_text_alone_is_packed_as_documents_are():
  """As few rows as those of the packing of text, which is another function."""
  tokens = RNG.integers(1, 33, 500)
  found = knapsack.best_fit(tokens, np.zeros(500, int), 32, 0)
  assert len(found) == len(packing.best_fit(tokens.tolist(), 32))


def _least(tokens, views, length, budget):
  """Returns the fewest rows that there can be, by enumeration."""
  for count in itertools.count(1):
    for rows in itertools.product(range(count), repeat=len(tokens)):
      used = [np.array(rows) == k for k in range(count)]
      if all(
        tokens[k].sum() <= length and views[k].sum() <= budget for k in used
      ):
        return count


def test_few_items_are_in_as_few_rows_as_there_can_be():
  """Best fit does not promise that, but mostly does it."""
  least, found = [], []
  for _ in range(20):
    tokens, views = RNG.integers(4, 9, 5), RNG.integers(0, 3, 5)
    least.append(_least(tokens, views, 16, 3))
    found.append(len(knapsack.best_fit(tokens, views, 16, 3)))
  extra = np.subtract(found, least)
  assert set(extra) <= {0, 1} and (extra == 0).sum() >= 16


def test_a_pool_lends_views_from_row_to_row():
  """Two images in one row and none in the other are one pool, not two."""
  tokens, views = np.array([9, 9]), np.array([2, 0])
  assert len(knapsack.best_fit(tokens, views, 10, 2, rows=2)) == 1
  assert len(knapsack.best_fit(tokens, views, 10, 2, rows=1)) == 2
  # Three images are more than a pool has.
  assert len(knapsack.best_fit(tokens, np.array([2, 1]), 10, 2, rows=2)) == 2
