"""Toy tasks whose answers are asked for anywhere, by counting."""

import numpy as np
import pytest

from research.data.sources.infilling import Orders, Pairs, Sums
from research.typing import UserError


def rows_of(task):
  return np.stack([x.tokens for x in task.examples()])


def test_sums_are_sums_and_some_are_given():
  task = Sums(modulus=3, length=6, given=3, seed=1, count=50, heldout=50)
  rows = rows_of(task)
  total = np.zeros(50, int)
  for d, a in zip(rows[:, 0::2].T, rows[:, 1::2].T, strict=True):
    total = total + d
    np.testing.assert_array_equal(a - 3, total % 3)
  learned = task.examples()[0].loss_mask
  assert np.flatnonzero(learned).tolist() == [1, 3, 5, 7, 9, 11]
  question = task.questions()["sums"]
  assert np.flatnonzero(question.scored).tolist() == [1, 3, 7, 9]
  assert (question.visible == ~question.scored).all()
  assert (question.rows != rows).any()


def test_pairs_are_told_once_or_twice():
  task = Pairs(count=10, size=2, words=9)
  rows = rows_of(task)
  assert rows.shape == (15, 5) and rows.max() == 10
  entities = {tuple(e) for e in task.entities().reshape(-1, 2)}
  assert len(entities) == 20
  for i in range(5):
    np.testing.assert_array_equal(rows[10 + i][:2], rows[i][3:])
    np.testing.assert_array_equal(rows[10 + i][3:], rows[i][:2])
  assert (rows[:10, 2] == 9).all() and (rows[10:, 2] == 10).all()


def test_of_pairs_told_once_the_other_order_is_not_learned():
  task = Pairs(count=10, size=2, words=9)
  learned = {tuple(row) for row in rows_of(task)}
  found = task.questions()
  for name, known in (
    *(("fact", True), ("template_trained", True)),
    *(("template_new", False), ("gap", True)),
  ):
    rows = {tuple(row) for row in found[name].rows}
    assert rows <= learned if known else not rows & learned
  assert np.flatnonzero(found["gap"].scored).tolist() == [0, 1]
  assert np.flatnonzero(found["fact"].scored).tolist() == [3, 4]


def test_orders_say_what_is_done():
  task = Orders(symbols=5, length=4, count=300)
  rows = rows_of(task)
  ways = {5: [0, 1, 2, 3], 6: [3, 2, 1, 0], 7: [3, 0, 1, 2]}
  assert set(rows[:, 0]) == set(ways)
  for row in rows:
    x, y = row[1:5], row[6:]
    assert row[5] == 9
    np.testing.assert_array_equal(y, x[ways[int(row[0])]])
  silent = Orders(symbols=5, length=4, count=300, instructed=False)
  assert set(rows_of(silent)[:, 0]) == {8}
  np.testing.assert_array_equal(rows_of(silent)[:, 1:], rows[:, 1:])
  assert np.flatnonzero(task.examples()[0].loss_mask).tolist() == [6, 7, 8, 9]
  assert silent.examples()[0].loss_mask.all()
  asked = silent.questions()["instructions"]
  assert set(asked.rows[:, 0]) == set(ways) and asked.scored.sum() == 4


def test_more_pairs_than_names_are_refused():
  with pytest.raises(UserError, match="count is 9, expected 2 to a quarter"):
    Pairs(count=9, size=1, words=20)
