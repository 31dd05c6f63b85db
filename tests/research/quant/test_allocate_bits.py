"""The greedy choice against all choices, and a run on a tiny model."""

import itertools

import numpy as np
import pytest

from research import tree, weights
from research.interop.load import Loaded
from research.quant import allocate_bits
from research.quant.allocate_bits import Allocation
from research.quant.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.typing import UserError
from tests import support
from tests.research.quant.test_rules import Bytes, Text

FORMATS = tuple(Affine(block=4, bits=bits, symmetric=True) for bits in (2, 8))
PROBE = Calibration(source=Text(), windows=4, length=16, batch=4)


def random_choices(seed, units=4, formats=4):
  rng = np.random.default_rng(seed)
  return {
    unit: [
      (float(bits), float(cost))
      for bits, cost in zip(
        rng.integers(1, 20, formats), rng.exponential(size=formats), strict=True
      )
    ]
    for unit in range(units)
  }


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_for_the_same_bits_costs_less(seed):
  choices = random_choices(seed)
  cheapest = sum(min(c)[0] for c in choices.values())
  dearest = sum(max(c)[0] for c in choices.values())
  every = [
    np.sum([choices[u][k] for u, k in enumerate(ks)], axis=0)
    for ks in itertools.product(range(4), repeat=4)
  ]
  for budget in np.linspace(cheapest, dearest, 9):
    found = allocate_bits.allocate(choices, budget)
    bits, cost = np.sum([choices[u][k] for u, k in found.items()], axis=0)
    assert bits <= budget
    # Once no step is skipped for lack of budget this holds of any budget.
    full = allocate_bits.allocate(choices, float("inf"))
    if found == full:
      assert cost == pytest.approx(min(c for _, c in every))


@pytest.mark.parametrize("seed", range(12))
def test_steps_are_the_best_for_what_they_take(seed):
  """Along the hull every prefix of steps is optimal: Everett's theorem."""
  choices = random_choices(seed)
  every = [
    np.sum([choices[u][k] for u, k in enumerate(ks)], axis=0)
    for ks in itertools.product(range(4), repeat=4)
  ]
  slopes = sorted(
    (choices[u][b][1] - choices[u][a][1])
    / (choices[u][b][0] - choices[u][a][0])
    for u, given in choices.items()
    for a, b in itertools.pairwise(allocate_bits.hull(given))
  )
  for slope in slopes:
    # Of all choices the least cost + price * bits, at this step's price.
    price = -slope * (1 - 1e-9)
    best = min(every, key=lambda x: x[1] + price * x[0])
    found = allocate_bits.allocate(choices, best[0])
    bits, cost = np.sum([choices[u][k] for u, k in found.items()], axis=0)
    assert cost <= best[1] + 1e-9 and bits <= best[0]


def test_what_is_dominated_is_no_step():
  choices = [(2.0, 5.0), (3.0, 6.0), (4.0, 4.5), (4.0, 3.0)]
  choices += [(6.0, 2.9), (8.0, 1.0)]
  assert allocate_bits.hull(choices) == [0, 3, 5]
  with pytest.raises(UserError, match="cheapest formats take 2"):
    allocate_bits.allocate({"a": choices}, 1.5)


def test_a_budget_is_kept_where_it_counts():
  model = support.model()
  params = support.params(model)
  how = Allocation(formats=FORMATS, bits=9.5, probe=PROBE)
  how = how.of(Loaded(model, params, Bytes(), {}))
  said = []
  packed, report = how.run(params, said.append)
  every = allocate_bits.held(packed)
  used = [w for path, w in every.items() if path.startswith("layers/")]
  size = sum(np.prod(w.shape) for w in used)
  assert 8 * sum(tree.nbytes(w) for w in used) <= 9.5 * size
  assert len(report.rows) == 21
  kept = [
    {w.format for w in map(every.get, paths)}
    for paths in how.units(params).values()
  ]
  assert len(kept) == 3 and all(len(formats) == 1 for formats in kept)
  assert len(set.union(*kept)) > 1  # not all alike
  assert sum("is kept in" in text for text in said) == 3
  # Each layer's choices: more bits, less divergence.
  choices = how.measured(params, how.units(params), said.append)
  for given in choices.values():
    assert [kl for _, kl in given] == sorted([kl for _, kl in given])[::-1]


@pytest.mark.parametrize(
  "options, says",
  [
    (dict(unit="z"), "'z' matches no matrix"),
    (dict(bits=1.0), "more than the budget"),
  ],
)
def test_what_cannot_be_is_said(options, says):
  model = support.model()
  params = support.params(model)
  how = Allocation(**dict(formats=FORMATS[:1], bits=9.5, probe=PROBE) | options)
  with pytest.raises(UserError, match=says):
    how.of(Loaded(model, params, Bytes(), {})).run(params)
  with pytest.raises(UserError, match="has no model"):
    how.run(params)


def test_matrices_are_replaced_by_address():
  model = support.model()
  params = support.params(model)
  every = allocate_bits.held(params)
  assert {"embed", "layers/2/mlp/down"} <= set(every)
  new = {"layers/1/mlp/up": 0 * every["layers/1/mlp/up"]}
  found = allocate_bits.held(allocate_bits.replaced(model, params, every | new))
  for path, w in found.items():
    same = np.array_equal(weights.dense(w), every[path])
    assert same == (path not in new)
