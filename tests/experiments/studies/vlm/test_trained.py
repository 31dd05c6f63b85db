"""The study of run files: what it reads, and what it says of their answers."""

import pytest

from experiments.studies.vlm import trained
from experiments.studies.vlm.trained import RunFile, Trained
from research.typing import UserError

SHAPES = RunFile(
  path="runs/vlm/shapes.gin",
  groups=("count", "exists/both"),
  strata=("count/pair",),
)
STUDY = Trained(files=(SHAPES,))


def report(real, rule, pair=0.1):
  groups = dict.fromkeys(("all", *SHAPES.groups), real) | {"count/pair": pair}
  return {name: group_of(right, rule) for name, right in groups.items()}


def group_of(real, rule):
  systems = {"real": real, "blind": 0.2, "shuffled": 0.3, "majority": rule}
  return {
    "systems": {k: {"score": x, "n": 9} for k, x in systems.items()},
    "margin": {"difference": real - max(0.3, rule)},
  }


def rows_of(*reals, rule=0.25):
  return {
    arm: {"answers": report(real, rule)}
    for arm, real in zip(STUDY.arms, reals, strict=True)
  }


def test_an_arm_is_the_run_file_with_its_seed():
  texts = [STUDY.settings(arm) for arm in STUDY.arms]
  assert len({*texts}) == 3
  for seed, text in enumerate(texts):
    assert f"SEED = {seed}" in text
  stages = SHAPES.read(2).experiment.stages.values()
  assert [stage.seed for stage in stages] == [2, 2]


def test_a_run_that_asks_nothing_is_refused():
  file = RunFile(path="runs/quickstart.gin", groups=("all",))
  with pytest.raises(UserError, match=r"quickstart\.gin: found no .*answers"):
    file.read(0)


def test_lines_and_verdicts_are_of_each_group():
  rows = rows_of(0.90, 0.92, 0.94)
  count, both, pair = STUDY.table(rows)
  assert (count["group"], both["group"]) == SHAPES.groups
  # A stratum is in the table, and not in the verdicts.
  assert pair["group"] == "count/pair"
  assert pair["right, %"].value == pytest.approx(10)
  assert count["right, %"].value == pytest.approx(92)
  assert count["best rule"] == "majority: 25.0"
  assert count["above the best of all"].value == pytest.approx(62)
  assert [x.holds for x in STUDY.verdicts(rows)] == [True]
  assert [x.holds for x in STUDY.verdicts(rows_of(0.5, 0.51, 0.52))] == [False]
  assert [x.holds for x in STUDY.verdicts(rows_of(0.2, 0.9, 0.7))] == [None]


def test_the_first_file_is_compared_with_each_other_one():
  """Paired by seed: a tenth better in all of them, however these differ."""
  other = RunFile(path="runs/vlm/other.gin", groups=SHAPES.groups)
  study = Trained(files=(SHAPES, other), first_is_best=True)
  reals = (0.5, 0.7, 0.9, 0.41, 0.59, 0.8)
  rows = {
    arm: {"answers": report(real, 0.25)}
    for arm, real in zip(study.arms, reals, strict=True)
  }
  *_, better = study.verdicts(rows)
  assert better.claim.startswith("shapes is right more often than other")
  assert better.found.startswith("10.000 ± ")
  assert better.holds
  worse = dict(
    zip(
      study.arms,
      [*list(rows.values())[3:], *list(rows.values())[:3]],
      strict=True,
    )
  )
  assert study.verdicts(worse)[-1].holds is False


def test_counts_have_no_rules_in_their_lines():
  """A report's "count = 3" has the model's own baselines alone."""
  file = RunFile(path="a.gin", groups=("count",), strata=("count = 3",))
  study, rows = Trained(files=(file,), seeds=3), rows_of(0.5, 0.6, 0.7)
  for row in rows.values():
    one = {x: {"score": 0.4, "n": 3} for x in ("real", "blind", "shuffled")}
    margin = {"difference": 0.0}
    row["answers"]["count = 3"] = {"systems": one, "margin": margin}
  rows = dict(zip(study.arms, rows.values(), strict=True))
  _, three = study.table(rows)
  assert (three["best rule"], three["n"]) == ("", 3)


def test_names_are_distinct():
  with pytest.raises(UserError, match=r"Trained\.files"):
    Trained(files=(SHAPES, SHAPES))
  assert trained.COLUMNS["real"] == "right, %"
