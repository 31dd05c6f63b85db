"""Intervals against enumerations of all resamples, and of all outcomes."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from research import intervals
from research.errors import UserError


def test_the_bootstrap_is_that_of_all_resamples():
  """All 4^4 samples with replacement, each as likely."""
  x = np.array([1.0, 2.0, 4.0, 8.0])
  each = [np.mean(s) for s in itertools.product(x, repeat=4)]
  low, high = np.quantile(each, [0.025, 0.975])
  found = intervals.of_mean(x, resamples=20_000)
  assert found.low == pytest.approx(low, abs=0.26)  # a step of the means
  assert found.high == pytest.approx(high, abs=0.26)
  assert intervals.of_mean(x, resamples=500) == intervals.bootstrap(
    lambda rows: x[rows].mean(), 4, resamples=500, vectorized=False
  )
  with pytest.raises(UserError, match="found 1 values, expected at least two"):
    intervals.of_mean(x[:1])


@pytest.mark.parametrize("n", [1, 5, 100])
def test_a_share_of_none_or_of_all_has_an_interval(n):
  z = stats.norm.ppf(0.975)
  reach = z**2 / (n + z**2)  # Wilson's of none
  none, every = (intervals.of_share(x * np.ones(n)) for x in (0, 1))
  assert none == pytest.approx((0, reach, 0))
  assert every == pytest.approx((1 - reach, 1, 0))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.97])
def test_a_share_is_covered(p):
  """Of all outcomes of 40, weighted: Wilson's covers 90% at least."""
  n, right = 40, np.arange(41)
  ends = [intervals.of_share(np.arange(n) < k) for k in right]
  inside = np.array([low <= p <= high for low, high, _ in ends])
  assert stats.binom.pmf(right, n, p) @ inside > 0.9


@pytest.mark.parametrize(
  ("ahead", "behind"), [(0, 0), (0.01, 0.01), (0.1, 0.02), (0.3, 0.3)]
)
def test_a_paired_difference_is_covered(ahead, behind):
  """Of all numbers of pairs in which one of two systems alone is right."""
  n, covered = 30, 0.0
  for a, b in itertools.product(range(n + 1), repeat=2):
    rest = n - a - b
    chance = stats.multinomial.pmf(
      (a, b, rest), n, (ahead, behind, 1 - ahead - behind)
    )
    if rest < 0 or chance < 1e-7:
      continue
    pairs = np.repeat([1.0, -1.0, 0.0], (a, b, rest))
    found = intervals.of_difference(pairs)
    covered += chance * (found.low <= ahead - behind <= found.high)
  assert covered > 0.9
  one = intervals.of_difference(np.array([1.0] + [0.0] * 99))
  assert one.low < 0 < one.high  # one pair of a hundred decides nothing


def test_other_values_are_the_bootstraps():
  partial = np.linspace(0, 1, 50)
  theirs = stats.bootstrap(
    (partial,), np.mean, method="percentile", rng=np.random.default_rng(1)
  ).confidence_interval
  for found in (intervals.of_share, intervals.of_difference):
    assert found(partial)[:2] == pytest.approx(theirs, abs=0.01)
  assert intervals.of_share(np.array([0.5])) == (0, 1, 0)
  assert intervals.of_difference(np.array([0.5])) == (-math.inf, math.inf, 0)


def test_resamples_without_a_value_do_not_count():
  x = np.array([math.nan] + [1.0] * 20)
  assert intervals.of_mean(x)[:2] == (1, 1)


def test_a_bootstrap_of_few_values_says_so():
  x = np.random.default_rng(0).standard_normal(30)
  assert intervals.of_mean(x).note == ""
  assert "a bootstrap of 5" in intervals.of_mean(x[:5]).note
  grid = intervals.bootstrap(lambda a, b: x[a].mean(-1) + x[b].mean(-1), 3, 30)
  assert "a bootstrap of 3" in grid.note
