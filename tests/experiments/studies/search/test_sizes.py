"""Effective model sizes, against sizes that are known in closed form."""

import math

import numpy as np
import pytest

from experiments.core import config
from experiments.core.stats import Mean
from experiments.studies import protocol, results
from experiments.studies.search import sizes
from experiments.studies.search.sizes import RIGHT, SIZE, EffectiveSizes, Rung
from experiments.studies.search.systems import System
from research.typing import UserError

RUN = "runs/search/claims_countdown_ladder.gin"
SMALL, LARGE, FIRST, SECOND = (
  System(step=x) for x in ("small", "large", "first", "second")
)
TABLE = EffectiveSizes(
  ladder=(
    Rung(system=SMALL, parameters=10_000),
    Rung(system=LARGE, parameters=1_000_000),
  ),
  compared=(FIRST, SECOND),
)


def lines(**right):
  """Returns the table, given accuracies by the systems' names."""
  table = {
    name: {"system": name, RIGHT: x, "MFLOP a problem": 1.0, "seeds": 1}
    for name, x in right.items()
  }
  ladder = [table.pop("small"), table.pop("large")]
  made = sizes.size_lines([10_000, 1_000_000], ladder, list(table.values()))
  return {x["system"]: x for x in made}


def test_a_size_is_interpolated_in_its_logarithm():
  found = lines(small=20, large=60, first=40, second=30)
  assert found["small"][SIZE] == 10 and found["large"][SIZE] == 1000
  # Half of the way in accuracy is the geometric mean of the sizes.
  assert found["first"][SIZE] == pytest.approx(math.sqrt(10 * 1000))
  assert found["second"][SIZE] == pytest.approx(10 * 100**0.25)
  assert found["first"]["from"] == found["first"]["to"] == ""


def test_an_interval_is_of_the_accuracy_and_of_the_ladder():
  found = lines(small=20, large=60, first=Mean(40, 10))["first"]
  assert found["from"] == pytest.approx(10 * 100**0.25)
  assert found["to"] == pytest.approx(10 * 100**0.75)
  # The low end is where the ladder is at its best, and the other way round.
  wider = lines(small=(20, 4), large=60, first=Mean(40, 10))["first"]
  assert wider[SIZE] == found[SIZE]
  assert wider["from"] == pytest.approx(10 * 100 ** (6 / 36))
  assert wider["to"] == pytest.approx(10 * 100 ** (34 / 44))
  # The ladder's alone is none of a system with one seed.
  assert lines(small=(20, 4), large=60, first=40)["first"]["from"] == ""


def test_beyond_the_ladder_there_is_a_bound_in_words():
  found = lines(small=20, large=60, first=(70, 15), second=10)
  assert found["first"][SIZE] == "at least 1000: beyond the ladder"
  assert found["first"]["to"] == found["first"][SIZE]
  assert found["first"]["from"] == pytest.approx(10 * 100 ** (35 / 40))
  assert found["second"][SIZE] == "at most 10: beyond the ladder"
  # Where the larger model is worse, nothing between the two is known.
  falling = lines(small=60, large=20, first=45, second=35)
  assert falling["first"][SIZE] == "at least 1000: beyond the ladder"
  assert falling["second"][SIZE] == "at most 10: beyond the ladder"


def test_lines_are_made_of_rows():
  def row(right, problems=10):
    each = [1.0] * right + [0.0] * (problems - right)
    return {"each": each, "n": 1, "flops_policy": 2e6, "flops_verifier": 1e6}

  rows = {SMALL: [row(2)], LARGE: [row(6)], FIRST: [row(3), row(5)]}
  small, large, first = TABLE.lines(lambda x: rows.get(x, []))
  assert (small[SIZE], large[SIZE]) == (10, 1000)
  assert first[SIZE] == pytest.approx(100) and first["seeds"] == 2
  assert first["MFLOP a problem"] == 3
  # Student's interval of 30% and 50%: ± 127 points.
  assert first[RIGHT].half == pytest.approx(127.06, abs=0.01)
  assert first["from"] == "at most 10: beyond the ladder"
  assert first["to"] == "at least 1000: beyond the ladder"
  del rows[LARGE]
  assert not TABLE.lines(lambda x: rows.get(x, []))


@pytest.mark.parametrize("counts", [(10,), (10, 10), (100, 10), (0, 10)])
def test_a_ladder_has_rising_sizes(counts):
  rungs = tuple(Rung(system=SMALL, parameters=n) for n in counts)
  with pytest.raises(UserError, match="EffectiveSizes.ladder: found models"):
    EffectiveSizes(ladder=rungs, compared=())


# --- the experiment ---


def test_recorded_sizes_are_those_of_the_recorded_accuracies():
  """Between two models: `log n` is linear in the accuracy."""
  table, recorded = (
    {row[0]: dict(zip(x["header"], row, strict=True)) for row in x["rows"]}
    for x in results.load(RUN)["tables"][:2]
  )
  report = config.read(RUN, root=protocol.Run).experiment.study.reports[0]
  names = [x.system.name for x in report.ladder]
  means, halves = np.array([table[x][RIGHT] for x in names]).T
  logs = np.log([x.parameters / 1e3 for x in report.ladder])

  def size(right, ladder):
    if (np.diff(ladder) <= 0).any():
      pytest.skip("the ladder's ends do not rise")
    if not ladder[0] < right <= ladder[-1]:
      bound, i = ("at least", -1) if right > ladder[0] else ("at most", 0)
      return f"{bound} {math.exp(logs[i]):.4g}: beyond the ladder"
    return pytest.approx(math.exp(np.interp(right, ladder, logs)), rel=1e-3)

  inside = 0
  for system in report.compared:
    line, (value, half) = recorded[system.name], table[system.name][RIGHT]
    assert line[RIGHT] == [value, half]
    assert line[SIZE] == size(value, means), system.name
    assert line["from"] == size(value - half, means + halves), system.name
    assert line["to"] == size(value + half, means - halves), system.name
    inside += sum(isinstance(line[x], float) for x in (SIZE, "from", "to"))
  assert inside > 4


def test_the_ladder_has_the_models_sizes():
  """Without embedding and head, counted in the models of the runs."""
  import jax

  from research.nn import presets

  study = config.read(RUN, root=protocol.Run).experiment.study
  report = study.reports[0]
  assert isinstance(report, sizes.EffectiveSizes)
  for rung in report.ladder:
    trained = rung.system.step.removesuffix("_greedy")
    (step,) = (x for x in study.steps if x.name == trained)
    sets = [x.replace("{seed}", "0") for x in step.set]
    own = config.read(step.path, sets).experiment.model.sizes
    model = presets.transformer(presets.FAMILIES["llama"], own, "float32")
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    made = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    total = sum(x.size for x in jax.tree.leaves(made))
    assert total - 2 * own.vocab * own.width == rung.parameters
