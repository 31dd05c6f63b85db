"""Intervals of studies, against scipy.stats and tables in print."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.core import stats
from experiments.studies.lora import lora_verdicts
from experiments.studies.quant import quant_task
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
  assert lora_verdicts.mean(x) == found


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


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 20), (37, 40)])
def test_an_accuracy_s_half_is_the_larger_one_of_wilson_s(hits, count):
  """Wilson 1927: the shares whose own error reaches the share that is found."""
  right = [True] * hits + [False] * (count - hits)
  found = quant_task.kept(right, [True] * count)
  away = hits / count + found.half * (1 if hits < count / 2 else -1)
  reach = 1.959964 * math.sqrt(away * (1 - away) / count)
  assert found.half == pytest.approx(reach, rel=1e-5)
