"""Choosing among samples, by hand."""

import pytest

from research.prm.scores.aggregate import Last, Min, Product
from research.search.choose import (
  BestOf,
  Confident,
  Majority,
  Weighted,
  accuracy,
  answers_of,
)
from research.search.engine import Path
from research.typing import UserError


def path(answer, *scores, log_prob=-1.0, stopped=True):
  steps = tuple((7, answer or 0) for _ in scores)
  return Path(0, 0, 3, steps, scores, log_prob, True, stopped)


PATHS = [
  path(1, 0.9, 0.2),
  path(1, 0.5, 0.3, log_prob=-9.0),
  path(2, 0.6, 0.6),
  path(2, 0.1, 0.9, log_prob=-8.0),
  path(3, 0.99, 0.98, stopped=False),
  path(None, 1.0),
]
ANSWERS = answers_of(PATHS, lambda x: x.tokens[-1] or None)


def test_a_path_that_was_cut_has_no_answer():
  assert ANSWERS == [1, 1, 2, 2, None, None]


@pytest.mark.parametrize(
  ("rule", "expected"),
  [
    (BestOf(Last()), {2: 1.0}),
    (BestOf(Min()), {2: 1.0}),
    (BestOf(Product()), {2: 1.0}),
    (Majority(), {1: 0.5, 2: 0.5}),
    (Weighted(Last()), {2: 1.0}),
    (Confident(keep=0.5, inner=Majority()), {1: 0.5, 2: 0.5}),
    (Confident(keep=0.5, inner=BestOf(Last())), {2: 1.0}),
    (Confident(keep=0.8), {2: 1.0}),
    (Confident(keep=0.01, inner=Weighted(Last())), {2: 1.0}),
  ],
)
def test_rules(rule, expected):
  assert rule(PATHS, ANSWERS) == pytest.approx(expected)


def test_products_of_many_steps_keep_their_order():
  """Their products, 1e-500 and the like, are 0 in floating point."""
  paths = [path(1, *[0.1] * 500), path(1, *[0.1] * 500), path(None, 1.0)]
  paths.append(path(2, *[0.1] * 499, 0.25))  # 2.5 times as likely
  answers = [1, 1, None, 2]
  assert Weighted(Product())(paths, answers) == {2: 1.0}
  assert Weighted(Product())([*paths, paths[0]], [*answers, 1]) == {1: 1.0}


@pytest.mark.parametrize(
  ("percent", "count"), [(70, 90), (58, 50), (10, 90), (1, 50), (100, 3)]
)
def test_a_share_of_the_votes_is_rounded_down_but_to_one(percent, count):
  paths = [path(i, 0.5, log_prob=-i) for i in range(1, count + 1)]
  found = Confident(keep=percent / 100)(paths, range(1, count + 1))
  assert len(found) == max(1, percent * count // 100)


def test_equal_scores_share_their_answers():
  paths = [path(1, 0.5), path(1, 0.5), path(2, 0.5), path(3, 0.1)]
  found = BestOf(Last())(paths, [1, 1, 2, 3])
  assert found == pytest.approx({1: 2 / 3, 2: 1 / 3})
  assert accuracy(found, lambda answer: answer == 2) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
  "rule", [BestOf(Last()), Majority(), Weighted(Last()), Confident()]
)
def test_nothing_is_chosen_where_nothing_was_answered(rule):
  assert rule(PATHS[4:], [None, None]) == {}
  assert accuracy({}, bool) == 0


def test_confidence_needs_log_probabilities():
  paths = [path(1, 0.5), path(2, 0.5, log_prob=None)]
  with pytest.raises(UserError, match="without a log-probability"):
    Confident()(paths, [1, 2])
  assert Confident()(paths, [1, None]) == {1: 1.0}
