"""Comparisons at equal cost: published multipliers, noise, closed forms."""

import numpy as np
import pytest

from research.errors import UserError
from research.search import optimal, protocols
from research.search.protocols import Curve


def test_inference_multipliers_are_those_of_the_specification():
  """Snell et al.'s three regimes, with a model 14 times larger."""
  found = [protocols.inference_multiplier(14, r) for r in (0.16, 0.79, 22)]
  assert found == pytest.approx([258, 63, 16], abs=0.5)
  # Equal total: M (X + Y) = X + multiplier Y.
  size, tokens, queries = 14, 1000, 160
  x, y = 6 * tokens, 2 * queries
  spent = x + protocols.inference_multiplier(size, queries / tokens) * y
  assert spent == pytest.approx(size * (x + y))
  assert protocols.total_flops(10, 600, 200) == 13


def test_a_budget_buys_measured_points_only():
  curve = Curve("small", (1, 10, 100), (0.2, 0.5, 0.4))
  found = [curve.affordable(x) for x in (0.5, 1, 99, 100, 1e9)]
  assert found == [None, 0, 1, 2, 2]  # the last one, not the best one
  assert curve.interpolated(0.5) is None
  assert curve.interpolated(10**0.5) == pytest.approx(0.35)
  assert curve.interpolated(1e9) == 0.4
  large = Curve("large", (50,), (0.6,))
  assert protocols.at_equal_cost([curve, large], 20) == {
    "small": (10, 0.5),
    "large": None,
  }
  assert protocols.at_equal_cost([large], 50) == {"large": (50, 0.6)}
  with pytest.raises(UserError, match="rising costs"):
    Curve("x", (2, 1), (0.1, 0.2))


def test_where_the_large_system_overtakes():
  small = Curve("small", (1, 10, 100), (0.3, 0.5, 0.55))
  large = Curve("large", (8, 80, 800), (0.4, 0.6, 0.7))
  assert protocols.crossover(small, large) == 80
  never = Curve("large", (8, 80, 800), (0.1, 0.2, 0.9))
  assert protocols.crossover(small, never) is None
  always = Curve("large", (0.5, 80), (0.4, 0.7))
  assert protocols.crossover(small, always) == 0.5
  cheap = Curve("large", (0.2, 0.5), (0.4, 0.7))  # no cost in common
  assert protocols.crossover(small, cheap) is None
  assert protocols.crossover(cheap, small) is None


def test_effective_size_is_never_extrapolated():
  sizes, accuracies = (10, 100, 1000, 10_000), (0.2, 0.4, 0.4, 0.8)
  size = protocols.effective_size(sizes, accuracies, 0.3)
  assert size.parameters == pytest.approx(10**1.5)
  assert size.bound == "between"
  # Equal accuracies: the smallest that reaches it, and on from the largest.
  exactly = protocols.effective_size(sizes, accuracies, 0.4)
  assert exactly.parameters == pytest.approx(100)
  above = protocols.effective_size(sizes, accuracies, 0.6)
  assert above.parameters == pytest.approx(10**3.5)
  assert protocols.effective_size(sizes, accuracies, 0.9) == (1e4, "at least")
  assert protocols.effective_size(sizes, accuracies, 0.1) == (10, "at most")
  with pytest.raises(UserError, match="from small to large"):
    protocols.effective_size((10, 5), (0.1, 0.2), 0.15)


def test_bins_have_equal_mass_and_equal_problems_share_one():
  pass_rates = np.linspace(0, 1, 100)
  bins = optimal.quantile_bins(pass_rates)
  assert np.bincount(bins).tolist() == [20] * 5
  assert (bins[-1], bins[0]) == (0, 4)  # level 0 is the easiest
  mixed = np.random.default_rng(0).permutation(100)
  assert (optimal.quantile_bins(pass_rates[mixed]) == bins[mixed]).all()
  rounded = np.round(pass_rates, 1)
  for x in np.unique(rounded):
    assert len(set(optimal.quantile_bins(rounded)[rounded == x])) == 1
  assert set(optimal.quantile_bins(np.ones(7))) == {2}
  levels = optimal.absolute_bins(np.array([1, 0.5, 0.49, 0.1, 0.09, 0]))
  assert levels.tolist() == [0, 0, 1, 1, 2, 2]


def test_choosing_on_the_reported_problems_inflates():
  """Ten strategies that are all the same: the best of noise is 0.07 better."""
  inflated, honest = [], []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    accuracy = (rng.random((10, 200)) < 0.5).astype(float)
    bins = np.arange(200) % 2
    found = optimal.compute_optimal(accuracy, bins, seed)
    inflated.append(found.same_problems)
    honest.append(found.accuracy)
  assert np.mean(honest) == pytest.approx(0.5, abs=0.02)
  # 1.54 standard errors is the mean of the largest of ten normal numbers.
  expected = 0.5 + 1.54 * 0.5 / np.sqrt(100)
  assert np.mean(inflated) == pytest.approx(expected, abs=0.02)


def test_the_best_strategy_of_each_bin_is_found():
  rng = np.random.default_rng(0)
  bins = np.repeat([0, 1], 200)
  chances = np.array([[0.9, 0.2], [0.5, 0.5], [0.6, 0.1]])
  accuracy = (rng.random((3, 400)) < chances[:, bins]).astype(float)
  found = optimal.compute_optimal(accuracy, bins)
  assert found.chosen == ((0, 1), (0, 1))
  expected = np.where(bins == 0, accuracy[0], accuracy[1])
  assert (found.per_problem == expected).all()
  assert found.accuracy == expected.mean()
  assert found.best_single == pytest.approx(accuracy[0].mean())
  assert found.random == pytest.approx(accuracy.mean())
  assert found.oracle == pytest.approx(accuracy.max(axis=0).mean())
  assert found.random < found.best_single < found.accuracy < found.oracle


def test_folds_choose_for_each_other():
  """A strategy that is right on one half only is reported on the other."""
  bins = np.zeros(40, int)
  folds = optimal._halves(bins, 0)
  assert np.bincount(folds).tolist() == [20, 20]
  accuracy = np.stack([folds == 0, folds == 1]).astype(float)
  found = optimal.compute_optimal(accuracy, bins)
  assert (found.accuracy, found.chosen) == (0, ((0,), (1,)))
  with pytest.raises(UserError, match="one problem in bin 1"):
    optimal.compute_optimal(accuracy, np.array([1] + [0] * 39))
