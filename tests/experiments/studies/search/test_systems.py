"""What two systems' rows say: accuracies, costs, verdicts."""

import itertools
import math
import re

import numpy as np
import pytest

from experiments.studies.search.systems import (
  Comparison,
  System,
  each_of,
  flops_of,
  line,
  verdict,
)
from research.typing import UserError


def row(each, right=(), samples=4, policy=1e6, verifier=0.0, prompt=1e5):
  return {
    "each": list(each),
    "right": list(right),
    "n": samples,
    "samples": [samples] * len(right),
    "flops_policy": policy,
    "flops_verifier": verifier,
    "prompt_flops_policy": prompt,
  }


def pair(first, second, **fields):
  names = System(step="first"), System(step="second")
  claim = Comparison(claim="c", first=names[0], second=names[1], **fields)
  return verdict(claim, first, second)


def test_an_exact_check_takes_the_first_right_one_of_any_k():
  """Against all subsets of two of four samples."""
  right = [0, 1, 2, 4]
  found = each_of(System(step="a", checked=2), [row([0] * 4, right)])
  subsets = list(itertools.combinations(range(4), 2))
  expected = [
    np.mean([any(i < n for i in subset) for subset in subsets]) for n in right
  ]
  np.testing.assert_allclose(found, [expected])


def test_an_exact_check_costs_its_samples_and_no_verifier():
  rows = [row([1], [1], samples=16, policy=1.7e6, verifier=5e6, prompt=1e5)]
  whole = flops_of(System(step="a"), rows)
  assert whole == (1.7e6, 5e6)
  assert flops_of(System(step="a", checked=16), rows) == (1.7e6, 0)
  four = flops_of(System(step="a", checked=4), rows)[0]
  assert math.isclose(four, 1e5 + 4 * 1e5)
  found = line(System(step="a", title="A"), rows)
  assert found["system"] == "A" and found["samples"] == 16
  assert math.isclose(found["MFLOP a problem"], 6.7)
  assert math.isclose(found["of these verifier, %"], 100 * 5 / 6.7)


def test_samples_are_those_that_a_search_chooses_among():
  """A best of 4 from a pool of 16 has the FLOPs of 4."""
  rows = [row([1], [3], samples=16, policy=5e5, prompt=1e5) | {"n": 4}]
  assert line(System(step="a"), rows)["samples"] == 4
  two = flops_of(System(step="a", checked=2), rows)[0]
  assert math.isclose(two, 1e5 + 2 * 1e5)


HIGH = [1.0] * 90 + [0.0] * 10
LOW = [1.0] * 60 + [0.0] * 40


@pytest.mark.parametrize(
  "first, second, fields, holds",
  [
    (HIGH, LOW, {}, True),
    (LOW, HIGH, {}, False),
    (HIGH, HIGH, {}, None),
    (HIGH, LOW, {"least": 0.5}, False),
    (HIGH, LOW, {"within": 1.0}, True),
    (HIGH, LOW, {"within": 0.9}, False),
  ],
)
def test_a_claim_holds_where_its_whole_interval_does(
  first, second, fields, holds
):
  found = pair([row(first)] * 3, [row(second)] * 3, **fields)
  assert found.holds is holds
  assert "at 1.00 times the FLOPs" in found.found
  if "within" not in fields:  # costs are known, whatever the seed
    alone = pair([row(first)], [row(second)], **fields)
    assert alone.holds is None and "1 seeds" in alone.found


def test_a_system_of_one_seed_meets_each_of_the_other():
  found = pair([row(HIGH), row(LOW)], [row(LOW)])
  assert found.found.startswith("75.0% against 60.0%: +15.0 points")
  assert "problems, 2 and 1 seeds" in found.found
  with pytest.raises(UserError, match="found 3 and 2 seeds"):
    pair([row(HIGH)] * 3, [row(LOW)] * 2)


def _first(count):
  return row([1.0] * count + [0.0] * (200 - count))


def test_seeds_that_disagree_decide_nothing():
  """A bootstrap of three has the least of them as its end: all above 0."""
  others = [_first(120)] * 3
  found = pair([_first(n) for n in (122, 140, 150)], others)
  assert found.holds is None
  assert float(re.search(r"\((\S+) to", found.found)[1]) > 0
  assert "3 seeds (± 17.6 over seeds alone)" in found.found
  assert pair([_first(n) for n in (138, 140, 142)], others).holds is True
  fewer = pair(others, [_first(n) for n in (122, 140, 150)])
  assert fewer.holds is None
