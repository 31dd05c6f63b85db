"""Tests bit allocation against all choices, and a run on a tiny model."""

import itertools

import numpy as np
import pytest

from research import tree, weights
from research.interop.loaded import Loaded
from research.quant.activations import Inputs, Round
from research.quant.algorithms import allocate_bits
from research.quant.algorithms.allocate_bits import Allocation
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.quant.untied_embedding import Untied
from research.typing import UserError
from tests import support
from tests.research.quant.test_quantize_by_rules import Bytes, Text

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


def totals(choices):
  """Returns (bits, cost) of every way to choose."""
  names = [range(len(given)) for given in choices.values()]
  return np.array(
    [
      np.sum([g[k] for g, k in zip(choices.values(), ks, strict=True)], axis=0)
      for ks in itertools.product(*names)
    ]
  )


@pytest.mark.parametrize("seed", range(24))
def test_no_choice_within_the_budget_costs_less(seed):
  """For any budget; greedy steps are not optimal."""
  choices = random_choices(seed)
  every = totals(choices)
  budgets = np.linspace(every[:, 0].min(), every[:, 0].max(), 23)
  binding = 0
  for budget in (*budgets, float("inf")):
    found = allocate_bits.allocate(choices, budget)
    bits, cost = np.sum([choices[u][k] for u, k in found.items()], axis=0)
    assert bits <= budget
    best = every[every[:, 0] <= budget, 1].min()
    assert cost == pytest.approx(best, rel=1e-12)
    binding += best > every[:, 1].min()
  assert binding


def test_of_equal_costs_it_takes_the_fewest_bits():
  choices = {"a": [(2.0, 1.0), (4.0, 0.0)], "b": [(2.0, 0.0), (3.0, 0.0)]}
  assert allocate_bits.allocate(choices, 9.0) == {"a": 1, "b": 0}


def test_many_units_are_few_states():
  """As many matrices as SmolLM2 has, in sizes as its, five formats."""
  rng = np.random.default_rng(0)
  sizes = rng.choice([110592, 331776, 884736], 210)
  rates = np.array([2.625, 3.4375, 4.5, 5.5, 6.5625])
  choices = {
    i: [
      (float(size * rate), float(gain * 4.0**-rate * rng.uniform(0.8, 1.2)))
      for rate in rates
    ]
    for i, (size, gain) in enumerate(
      zip(sizes, rng.lognormal(sigma=1.5, size=210), strict=True)
    )
  }
  budget = 4.25 * sizes.sum()
  found = allocate_bits.allocate(choices, budget)
  bits, cost = np.sum([choices[i][k] for i, k in found.items()], axis=0)
  assert bits <= budget
  # No way to choose costs less than a share of one at a price of bits does.
  price = [
    max(
      sum(min(c + p * b for b, c in given) for given in choices.values())
      - p * budget
      for p in np.geomspace(1e-12, 1e-6, 400)
    )
  ]
  assert price[0] <= cost <= price[0] * 1.01


def test_dominated_choices_are_skipped():
  choices = [(2.0, 5.0), (3.0, 6.0), (4.0, 4.5), (4.0, 3.0)]
  choices += [(6.0, 2.9), (8.0, 1.0)]
  assert allocate_bits.hull(choices) == [0, 3, 5]
  with pytest.raises(UserError, match="cheapest formats take 2"):
    allocate_bits.allocate({"a": choices}, 1.5)


@pytest.mark.slow
def test_a_run_keeps_its_budget():
  model = support.model()
  params = support.params(model)
  how = Allocation(formats=FORMATS, bits=9.5, probe=PROBE)
  how = how.with_model(Loaded(model, params, Bytes(), {}))
  said = []
  packed, report = how.run(params, said.append)
  every = allocate_bits.packable_weights(packed)
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
  assert sum("is quantized to" in text for text in said) == 3
  # Each layer's choices: more bits, less divergence.
  choices = how.measure(params, how.units(params), said.append)
  for given in choices.values():
    assert [kl for _, kl in given] == sorted([kl for _, kl in given])[::-1]


def test_both_matrices_of_an_untied_embedding_count():
  model = support.model(tied=True)
  params = support.params(model)
  table = params["embed"]
  params = params | {"embed": Untied(table, 2.0 * table)}
  how = Allocation(formats=FORMATS, bits=7.0, unit="^embed$", probe=PROBE)
  how = how.with_model(Loaded(model, params, Bytes(), {}))
  packed, _ = how.run(params)
  for w in (packed["embed"].table, packed["embed"].head):
    assert w.format == FORMATS[0] and w.bits_per_weight == 6  # 12 are too many


@pytest.mark.parametrize(
  "options, says",
  [
    (dict(unit="z"), "'z' matches no matrix"),
    (dict(bits=1.0), "more than the budget"),
  ],
)
def test_impossible_settings_raise(options, says):
  model = support.model()
  params = support.params(model)
  how = Allocation(**dict(formats=FORMATS[:1], bits=9.5, probe=PROBE) | options)
  with pytest.raises(UserError, match=says):
    how.with_model(Loaded(model, params, Bytes(), {})).run(params)
  with pytest.raises(UserError, match="has no model"):
    how.run(params)


def test_what_rounds_activations_stays():
  """Divergences would else be those of a model that does not round them."""
  model = support.model()
  params = Inputs(op=Round(bits=3))(support.params(model))
  every = allocate_bits.packable_weights(params)
  found = allocate_bits.with_weights(model, params, every)
  tokens = support.tokens()
  want, got = (model.apply({"params": p}, tokens)[0] for p in (params, found))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_matrices_are_replaced_by_address():
  model = support.model()
  params = support.params(model)
  every = allocate_bits.packable_weights(params)
  assert {"embed", "layers/2/mlp/down"} <= set(every)
  new = {"layers/1/mlp/up": 0 * every["layers/1/mlp/up"]}
  found = allocate_bits.packable_weights(
    allocate_bits.with_weights(model, params, every | new)
  )
  for path, w in found.items():
    same = np.array_equal(weights.dense(w), every[path])
    assert same == (path not in new)
