"""Statistics of studies, against enumerations, scipy and tables in print."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.core import stats
from research.typing import UserError


@pytest.mark.parametrize("count", range(2, 31))
def test_student_s_interval_has_any_number_of_seeds(count):
  """Also of 7, 9 and more than 10, which a table by hand had left out."""
  x = np.random.default_rng(count).normal(3, 2, count)
  low, high = scipy_stats.t.interval(
    0.95, count - 1, loc=x.mean(), scale=scipy_stats.sem(x)
  )
  found = stats.mean(x)
  assert found.value - found.half == pytest.approx(low, rel=1e-9)
  assert found.value + found.half == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize(
  ("count", "quantile"),
  [(2, 12.706), (3, 4.303), (7, 2.447), (9, 2.306), (11, 2.228), (121, 1.980)],
)
def test_quantiles_are_those_in_print(count, quantile):
  x = np.arange(count)
  found = stats.mean(x).half / scipy_stats.sem(x)
  assert found == pytest.approx(quantile, abs=5e-4)


def test_one_value_says_nothing_of_its_spread():
  assert stats.mean([2.0]) == (2.0, math.inf)
  with pytest.raises(UserError, match="no values"):
    stats.mean([])


def test_a_mean_in_another_unit():
  assert stats.Mean(0.5, 0.1).times(100) == (50, 10)
  assert str(stats.Mean(0.5, 0.1)) == "0.500 ± 0.100"
  assert str(stats.mean([0.5])) == "0.500 (one value)"
  assert str(stats.mean([0.5, math.nan])) == "nan ± nan"  # of a run that broke


def test_an_interval_decides():
  for value, want in ((3, True), (1.5, None), (0, False), (1, None)):
    found = stats.Mean(value, 1.0)
    assert stats.above(found, 1.5) is want
    assert stats.below(found.times(-1), -1.5) is want
  assert stats.above(stats.Mean(9, math.inf)) is None
  assert stats.above(stats.Mean(0.0, 0.0)) is False
  for value, want in ((0.5, True), (1.5, None), (3.5, False), (9, False)):
    for sign in (1, -1):
      assert stats.equivalent(stats.Mean(sign * value, 1.0), 2) is want
  assert stats.equivalent(stats.Mean(0.0, math.inf), 2) is None
  assert stats.equivalent(stats.Mean(0.0, 3.0), 2) is None


@pytest.mark.parametrize("effect, seeds", [(1.0, 10), (0.5, 34), (0.01, 100)])
def test_seeds_that_would_decide_are_those_of_tables_of_power(effect, seeds):
  """One-sample t-tests, two-sided 5%, power 0.8 (Cohen 1988)."""
  values = np.array([-1.0, 0.0, 1.0]) + effect  # a standard deviation of 1
  found = stats.mean(values)
  assert stats.seeds_to_decide(found, 3) == seeds
  assert (
    stats.seeds_to_decide(found._replace(value=found.value + 2), 3, 2) == seeds
  )
