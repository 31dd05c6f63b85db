"""Where a larger policy overtakes: counted by hand on pools of few problems."""

import math

import numpy as np
import pytest

from experiments.studies.search.crossovers import Crossovers
from experiments.studies.search.systems import System

SMALL, LARGE = System(step="small"), System(step="large")
LEADS = "the larger one leads from, MFLOP"


def row(right, samples, cost):
  """Returns a pool's row: `cost` MFLOP a sample, and none for the prompt."""
  return {
    "each": [0.0] * len(right),
    "right": np.asarray(right).tolist(),
    "samples": [samples] * len(right),
    "n": samples,
    "flops_policy": 1e6 * cost * samples,
    "flops_verifier": 0.0,
    "prompt_flops_policy": 0.0,
  }


def line(small, large):
  rows = {SMALL: small, LARGE: large}
  (only,) = Crossovers(pools=(SMALL, LARGE)).lines(rows.__getitem__)
  return only


def solved(right, samples, k):
  """Returns the share of draws of k samples of which one is right."""
  return 1 - math.comb(samples - right, k) / math.comb(samples, k)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_lowest_cost_of_which_no_higher_one_is_behind(seeds):
  """Four samples at the cost of one; all problems alike, so no interval."""
  small = [row([2] * 5, 16, 1)] * seeds
  large = [row([3] * 5, 4, 4)] * seeds
  found = line(small, large)
  costs = 4 * np.arange(1, 5)
  ahead = [
    solved(3, 4, i + 1) > solved(2, 16, int(cost))
    for i, cost in enumerate(costs)
  ]
  assert ahead == [True, True, True, False]  # both solve all at the end
  assert found[LEADS] == found["from"] == found["to"] == "beyond 16"

  large = [row([3] * 5, 8, 4)] * seeds
  found = line(small, large)
  assert solved(3, 8, 1) < solved(2, 16, 4), "behind at equal cost"
  assert solved(3, 8, 4) < solved(2, 16, 16) == 1
  assert found[LEADS] == "beyond 16"

  small = [row([1] * 5, 64, 1)] * seeds
  found = line(small, large)
  assert all(solved(3, 8, k) > solved(1, 64, 4 * k) for k in range(1, 9))
  assert found[LEADS] == found["from"] == found["to"] == 4
  assert found["measured in both, MFLOP"] == "4 to 32"


def test_problems_that_differ_have_an_interval():
  rng = np.random.default_rng(0)
  small = [row(rng.binomial(16, 0.15, 200), 16, 1) for _ in range(3)]
  large = [row(rng.binomial(16, 0.5, 200), 16, 6) for _ in range(3)]
  found = line(small, large)
  assert found["from"] <= found[LEADS] <= found["to"]
  assert "too narrow: a bootstrap of 3" in found["seeds"]


def test_a_policy_without_rows_is_left_out():
  rows = {SMALL: [row([1], 2, 1)], LARGE: []}
  assert Crossovers(pools=(SMALL, LARGE)).lines(rows.__getitem__) == []
