"""The algebra of sweeps: against itertools, and what is refused."""

import collections
import itertools
import re

import hypothesis
import pytest
from hypothesis import strategies as st
from scipy import stats

from experiments import sweeps
from experiments.core import config
from research.typing import UserError

A = {"A": [1, 2]}
B = {"B": ["x", "y", "z"]}


def test_a_grid_is_the_product():
  expected = [
    {"A": a, "B": b} for a, b in itertools.product([1, 2], ["x", "y", "z"])
  ]
  assert sweeps.expand(A | B) == expected
  assert sweeps.expand({"product": [A, B]}) == expected
  assert sweeps.expand({"product": A | B}) == expected
  assert sweeps.expand({}) == [{}]


def test_zip_goes_side_by_side():
  expected = [{"A": 1, "C": 5}, {"A": 2, "C": 6}]
  assert sweeps.expand({"zip": {"A": [1, 2], "C": [5, 6]}}) == expected
  assert sweeps.expand({"zip": [A, {"C": [5, 6]}]}) == expected
  # A grid inside counts as the list that it makes.
  six = {"zip": [A | B, {"C": list(range(6))}]}
  assert [u["C"] for u in sweeps.expand(six)] == list(range(6))


def test_chain_is_one_after_the_other():
  assert sweeps.expand({"chain": [{}, A, B]}) == [
    {},
    *sweeps.expand(A),
    *sweeps.expand(B),
  ]


def test_trees_nest():
  tree = {"product": [{"chain": [A, {"C": [0]}]}, {"D": [8, 9]}]}
  found = sweeps.expand(tree)
  assert len(found) == (2 + 1) * 2
  assert found[-1] == {"C": 0, "D": 9}


RATES = {"LEARNING_RATE": {"log_uniform": (1e-5, 1e-1)}}


def test_rates_are_drawn_uniformly_in_their_logarithm():
  """By the Kolmogorov-Smirnov test against the distribution that scipy has."""
  units = sweeps.expand({"sample": RATES, "count": 400, "seed": 7})
  rates = [unit["LEARNING_RATE"] for unit in units]
  uniform = stats.loguniform(1e-5, 1e-1)
  assert stats.kstest(rates, uniform.cdf).pvalue > 0.01
  assert stats.kstest(rates, stats.uniform(0, 0.1).cdf).pvalue < 1e-6
  # Short, and read back as it is.
  assert all(rate == float(f"{rate:.4g}") for rate in rates)


def test_choices_are_drawn_alike():
  tree = {"sample": {"A": ["x", "y"], **RATES}, "count": 400}
  counts = collections.Counter(unit["A"] for unit in sweeps.expand(tree))
  assert stats.binomtest(counts["x"], 400).pvalue > 0.01


def test_draws_stay_when_a_sweep_grows():
  few = sweeps.expand({"sample": RATES | A, "count": 5, "seed": 1})
  more = sweeps.expand({"sample": RATES | A | B, "count": 9, "seed": 1})
  assert [{**unit, "B": 0} for unit in few] == [
    {**unit, "B": 0} for unit in more[:5]
  ]
  assert few != sweeps.expand({"sample": RATES | A, "count": 5, "seed": 2})
  # The same in every Python and on every machine.
  assert few[0] == {"LEARNING_RATE": 0.004216, "A": 2}


def test_units_that_are_drawn_differ():
  every = sweeps.expand({"sample": A | B, "count": 6})
  grid = sweeps.expand(A | B)
  assert sorted(map(repr, every)) == sorted(map(repr, grid)) and every != grid
  part = {"product": [{"sample": RATES, "count": 2}, A]}
  assert len(sweeps.expand(part)) == 4


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@hypothesis.given(SIZES)
def test_counts(sizes):
  """A product multiplies, a chain adds."""
  parts = [{f"X{i}": list(range(n))} for i, n in enumerate(sizes)]
  product = sweeps.expand({"product": parts})
  assert len(product) == len({tuple(u.items()) for u in product})
  total = 1
  for n in sizes:
    total *= n
  assert len(product) == total
  assert len(sweeps.expand({"chain": parts})) == sum(sizes)


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({"zip": {"A": [1, 2], "B": [1]}}, r"lists of \[1, 2\] units"),
    ({"product": [A, A]}, "A is given twice"),
    ({"A": 3}, r"A has 3, expected a list"),
    ({"A": []}, r"A has \[\]"),
    ({"A": "xyz"}, "expected a list of values"),
    ({"zip": 3}, "'zip' holds 3"),
    ({"chain": []}, "'chain' holds"),
    ({"chain": [A], "B": [1]}, r"found \['B'\] next to 'chain'"),
    ({"product": [3]}, "found 3 in 'product'"),
    ({"sample": A | B, "count": 7}, "'count': 7, but its axes have 6"),
    ({"sample": A}, "'count': None, expected an integer from 1"),
    ({"sample": A, "count": True}, "'count': True"),
    ({"sample": A, "count": 1, "seed": -1}, "'seed': -1, expected"),
    ({"sample": A, "count": 1, "B": [1]}, r"found \['B'\] next to 'sample'"),
    ({"sample": [A], "count": 1}, "'sample' holds"),
    ({"sample": {"A": []}, "count": 1}, r"A: \[\], expected a list"),
    ({"sample": {"A": {"uniform": (1, 2)}}, "count": 1}, "expected a list of"),
    ({"sample": {"A": {"log_uniform": (0, 2)}}, "count": 1}, "0 < LOW < HIGH"),
  ],
)
def test_what_is_no_sweep_is_refused(tree, message):
  with pytest.raises(UserError, match=message) as error:
    sweeps.expand(tree)
  assert len(str(error.value).splitlines()) <= 3


def test_seeds_come_last_and_fixed_ones_do_not_vary():
  sweep = sweeps.Sweep(config="x", over=A, seeds=[3, 4])
  assert [(u["A"], u["SEED"]) for u in sweep.units()] == [
    (1, 3),
    (1, 4),
    (2, 3),
    (2, 4),
  ]
  with pytest.raises(UserError, match="A is fixed, and varies"):
    sweeps.Sweep(config="x", over=A, fixed={"A": 1}).units()
  with pytest.raises(UserError, match="SEED is given twice"):
    sweeps.Sweep(config="x", over={"SEED": [1]}, seeds=[1]).units()
  with pytest.raises(UserError, match="C varies in no unit"):
    sweeps.Sweep(config="x", over=A, axis="C").units()


def test_values_reach_gin_as_they_are():
  """Built into the run's configuration, they are what was written."""
  unit = {
    "LEARNING_RATE": 3e-5,
    "EVAL_BATCHES": None,
    "DTYPE": "bfloat16",
    "lora.LoRA.rslora": True,
    "adapt.Adapt.targets": ["q", "k'v"],
    "experiment.Experiment.transforms": ("@adapt.Adapt()",),
    "experiment.Experiment.continuation": "%RANK",
  }
  read = config.read("runs/quickstart.gin", sweeps.bindings(unit)).experiment
  assert read.eval_batches is None
  assert read.model.dtype == "bfloat16"
  (adapt,) = read.transforms
  assert adapt.method.rslora is True and list(adapt.targets) == ["q", "k'v"]
  assert read.continuation == adapt.method.rank == 8


def test_names_are_good_file_names_and_stay():
  assert sweeps.name({"RANK": 8, "LR": 1e-5}) == "RANK=8_LR=1e-05"
  assert sweeps.name({}) == "base"
  odd = [
    {"x/y.Z.a": 1},
    {"x_y.Z.a": 1},
    {"A": "a b"},
    {"A": "a/b"},
    {"A": (1, 2)},
    {"A": "é" * 300},
    {"A": "é" * 301},
  ]
  names = [sweeps.name(unit) for unit in odd]
  assert len(set(names)) == len(odd)
  for name in names:
    assert re.fullmatch(r"[\w.=+-]+", name) and len(name.encode()) < 255


@pytest.mark.parametrize(
  ("units", "expected"),
  [
    ([{"A": a, "B": b} for a in (1, 2) for b in (1, 2, 3)], "B"),
    ([{"A": a, "B": b} for a in (1, 2) for b in "xyz"], "A"),
    ([{"A": True, "SEED": s} for s in range(9)], "A"),
    ([{"SEED": 1}, {"SEED": 2}], None),
    ([{}, {"A": 1}], "A"),
  ],
)
def test_the_axis_has_most_values_numbers_first(units, expected):
  assert sweeps.axis(units, "SEED") == expected


SWEEPS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("sweeps/**/*.gin")
)
HEADER = ("# Claim:", "# Run:", "# Cost:", "# Expect:")


@pytest.mark.parametrize("file", SWEEPS)
def test_every_sweep_builds_and_says_what_it_is_for(file):
  text = (config.CONFIGS / file).read_text()
  assert all(field in text for field in HEADER)
  assert len(text.splitlines()) <= 40
  sweep = config.read(file, root=sweeps.Sweep, flag="sweep").experiment
  units = sweep.units()
  texts = {
    config.read(
      sweep.config, [*sweeps.bindings(sweep.fixed), *sweeps.bindings(unit)]
    ).text
    for unit in units
  }
  assert len(texts) == len(units) > 1
