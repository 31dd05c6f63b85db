"""Tasks of the studies of diffusion, by counting and by simulation."""

import itertools

import numpy as np
import pytest

from experiments.studies.diffusion import (
  following,
  reversal,
  tasks,
)
from research.typing import UserError


def test_sums_are_sums_and_some_are_told():
  task = tasks.Sums(modulus=3, length=6, given=3, seed=1)
  rows = task.rows("train", 50)
  digits, sums = rows[:, 0::2], rows[:, 1::2] - 3
  assert set(digits.ravel()) == {0, 1, 2}
  total = np.zeros(50, int)
  for d, a in zip(digits.T, sums.T, strict=True):
    total = total + d
    np.testing.assert_array_equal(a, total % 3)
  assert np.flatnonzero(task.learned()).tolist() == [1, 3, 5, 7, 9, 11]
  assert np.flatnonzero(task.answer_mask()).tolist() == [1, 3, 7, 9]
  assert task.mask_id > rows.max()
  assert (task.rows("heldout", 50) != rows).any()


def test_targets_are_met_as_often_as_said():
  task = tasks.Targets(digits=4, length=3, honest=0.4)
  rows = task.rows(20_000)
  digits, target = rows[:, 1:], rows[:, 0] - 4
  assert set(target) == set(range(10)) and task.mask_id == 14
  right = digits.sum(1) == target
  np.testing.assert_array_equal(task.right(rows), right)
  # Intent, or luck: 0.4 + 0.6 / 10; four standard errors.
  assert right.mean() == pytest.approx(0.46, abs=4 * 0.5 / 20_000**0.5)


def test_answers_are_as_alike_as_they_are_likely():
  task = tasks.Targets(digits=2, length=2)
  # Sum 1 in two ways, sum 0 in one; a wrong answer does not count.
  one = [[3, 0, 1]] * 3 + [[3, 1, 0]] * 3 + [[2, 0, 0]] * 2 + [[3, 1, 1]]
  # Pairs that are the same: 6 + 6 + 2; evenly: 6 * 5 / 2 + 2 * 1 / 1.
  assert task.agreement(np.array(one)) == pytest.approx(14 / 17)
  assert task.agreement(np.array([[3, 0, 1]] * 4)) == pytest.approx(2)
  assert task.agreement(np.array([[3, 1, 1]])) == 1


def test_walks_are_valid_and_as_long_as_counted():
  task = tasks.Walks(nodes=6, length=14)
  rows = task.rows("train", 6000)
  assert rows.shape == (6000, 16) and task.valid(rows).all()
  pair = (rows[:, 0] == 1) & (rows[:, 1] == 3)
  lengths = task.lengths(rows[pair])
  error = 4 * lengths.std() / len(lengths) ** 0.5
  assert lengths.mean() == pytest.approx(task.mean_length(1, 3), abs=error)


def test_the_mean_length_is_that_of_all_walks():
  task = tasks.Walks(nodes=4, length=7)
  lengths, chances = [], []
  for n in range(1, 7):
    for turns in itertools.product((-1, 1), repeat=n):
      walk = np.cumsum((0, *turns))[1:] % 4
      if (walk == 2).sum() == 1 and walk[-1] == 2:
        lengths.append(n)
        chances.append(0.5**n)
  want = np.average(lengths, weights=chances)
  assert task.mean_length(0, 2) == pytest.approx(want)


@pytest.mark.parametrize(
  "walk",
  [
    [1, 2, 9, 8, 8, 8, 8, 8, 8],  # no node, no end
    [2, 3, 8, 8, 8, 8, 8, 8, 8],  # two at once
    [1, 2, 8, 8, 8, 8, 8, 8, 8],  # ends before the goal
    [1, 2, 3, 4, 3, 8, 8, 8, 8],  # passes it
    [1, 2, 3, 8, 8, 8, 3, 8, 8],  # goes on after its end
    [8, 8, 8, 8, 8, 8, 8, 8, 8],  # nothing
    [1, 2, 1, 2, 1, 2, 1, 2, 1],  # never ends
  ],
)
def test_other_walks_are_not(walk):
  task = tasks.Walks(nodes=8, length=9)
  good = np.array([[0, 3, 1, 2, 3, 8, 8, 8, 8, 8, 8]])
  assert task.valid(good)[0]
  assert not task.valid(np.array([[0, 3, *walk]]))[0]


def test_pairs_are_told_once_or_twice():
  pairs = reversal.Pairs(count=10, size=2, words=9)
  rows = pairs.rows()
  assert rows.shape == (15, 5) and rows.max() == 10 < pairs.mask_id
  entities = {tuple(e) for e in pairs.entities().reshape(-1, 2)}
  assert len(entities) == 20
  for i in range(5):
    np.testing.assert_array_equal(rows[10 + i][:2], rows[i][3:])
    np.testing.assert_array_equal(rows[10 + i][3:], rows[i][:2])
  assert (rows[:10, 2] == 9).all() and (rows[10:, 2] == 10).all()


def test_orders_say_what_is_done():
  task = following.Orders(symbols=5, length=4)
  rows = task.rows("train", 300, instructed=True)
  ways = {5: [0, 1, 2, 3], 6: [3, 2, 1, 0], 7: [3, 0, 1, 2]}
  assert set(rows[:, 0]) == set(ways)
  for row in rows:
    x, y = row[1:5], row[6:]
    assert row[5] == 9
    np.testing.assert_array_equal(y, x[ways[int(row[0])]])
  silent = task.rows("train", 300, instructed=False)
  assert set(silent[:, 0]) == {8}
  np.testing.assert_array_equal(silent[:, 1:], rows[:, 1:])
  assert np.flatnonzero(task.learned()).tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(
  "make",
  [
    lambda: tasks.Sums(modulus=1),
    lambda: tasks.Targets(honest=1.5),
    lambda: tasks.Walks(nodes=9, length=9),
    lambda: reversal.Pairs(count=9, size=1, words=20),
    lambda: following.Orders(length=1),
  ],
)
def test_tasks_that_make_no_sense_are_refused(make):
  with pytest.raises(UserError, match="expected"):
    make()
