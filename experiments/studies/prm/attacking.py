"""What attacks on solutions do to scorers that learned from unchanged ones.

An attacked solution is scored by the model of its fold, which learned from
unchanged solutions of other problems, with the strength that was chosen there.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.core import stats
from experiments.studies.prm import judging
from experiments.studies.prm.scorers import Labelled, Scorer
from experiments.studies.prm.states import FrozenStates
from experiments.studies.protocol import Row, Verdict
from research.prm.attacks import ATTACKS, Attacked
from research.prm.labelled import LabelledSolution
from research.prm.scores import attack_report
from research.prm.scores.aggregate import AGGREGATES
from research.search.estimators import Estimate
from research.typing import UserError

CONTROL = "corrupted"
"""The attack that a model must notice."""

TRACES = {"min": "worst step", "geometric": "geometric mean"}
"""Aggregates that score whole solutions. A worst step cannot rise by fillers
alone, and a mean can; products fall with every step, whatever it says."""


class Changed(NamedTuple):
  """What an attack made of solutions.

  Attributes:
    indices: of the solutions among all; those that it leaves alone are out.
    attacked: what each of them became.
    data: the attacked solutions, with the model's states.
  """

  indices: list[int]
  attacked: list[Attacked]
  data: Labelled


class Prepared(NamedTuple):
  """Unchanged solutions, and by each attack's name the attacked ones."""

  data: Labelled
  changed: Mapping[str, Changed]


def check(names: Sequence[str], problems: int | None) -> None:
  """Checks a study's settings.

  Raises:
    UserError: there is no such attack, or it has no problems.
  """
  for name in names:
    if name not in ATTACKS:
      raise UserError(
        f"HumanLabels.attacks: found {name!r}, expected one of"
        f" {', '.join(ATTACKS)}"
      )
  if problems is not None and problems < 2:
    raise UserError(
      f"HumanLabels.attacked_problems: found {problems}, expected 2 or more,"
      " or None for all"
    )


def change(
  name: str,
  solutions: Sequence[LabelledSolution],
  problems: int | None,
  seed: int,
) -> tuple[list[int], list[Attacked]]:
  """Returns which solutions an attack changes, and what they become.

  Args:
    name: of `prm.attacks.ATTACKS`.
    solutions: all of them.
    problems: most problems, drawn from those with a solution that it changes.
      All of their solutions that it changes are attacked. None for all.
    seed: of the draw.

  Raises:
    UserError: it changes none.
  """
  every = [ATTACKS[name](one) for one in solutions]
  indices = [
    i
    for i, (one, other) in enumerate(zip(solutions, every, strict=True))
    if one.steps != other.solution.steps
  ]
  if not indices:
    raise UserError(
      f"HumanLabels.attacks: found {name!r}, which changes none of"
      f" {len(solutions)} solutions, expected one that it changes; leave it out"
    )
  problem = judging.problems_of(solutions)
  names = sorted({problem[i] for i in indices})
  order = np.random.default_rng(seed).permutation(len(names))
  drawn = {names[i] for i in order[:problems]}
  indices = [i for i in indices if problem[i] in drawn]
  return indices, [every[i] for i in indices]


def prepare(
  names: Sequence[str],
  data: Labelled,
  problems: int | None,
  seed: int,
  states: FrozenStates,
  workdir: pathlib.Path,
) -> Prepared:
  """Returns the solutions and the attacked ones, whose states are stored.

  Args:
    names: of the attacks.
    data: unchanged solutions.
    problems, seed: see `change`.
    states: reads attacked solutions as it read the unchanged ones.
    workdir: where it stores what it computes.

  Raises:
    UserError: an attack changes nothing, or a solution has become longer than
      the model's context.
  """
  # Before a model reads anything.
  found = {x: change(x, data.solutions, problems, seed) for x in names}
  changed = {}
  for name, (indices, attacked) in found.items():
    solutions = [x.solution for x in attacked]
    read = Labelled(solutions, states.compute(solutions, workdir))
    changed[name] = Changed(indices, attacked, read)
  return Prepared(data, changed)


def row(
  scorer: Scorer,
  data: Labelled,
  changed: Changed,
  base: Row,
  folds: int,
  seed: int,
) -> Row:
  """Returns the scores before and after an attack, and reports of them.

  Args:
    scorer: learns anew for each fold.
    data: all unchanged solutions.
    changed: what an attack made of some.
    base: the scorer's row of unchanged solutions, with their scores and the
      strength of each fold.
    folds, seed: of the partition that the row is from.
  """
  after = judging.scored_by_folds(
    scorer, data, changed.indices, changed.data, base["strengths"], folds, seed
  )
  after = [np.round(x, 6) for x in after]
  before = [np.array(base["scores"][i]) for i in changed.indices]
  solutions = [data.solutions[i] for i in changed.indices]
  reports = {
    name: attack_report(
      solutions, changed.attacked, before, after, AGGREGATES[name]
    ).to_json()
    for name in TRACES
  }
  return {
    "indices": changed.indices,
    "before": [x.tolist() for x in before],
    "after": [x.tolist() for x in after],
    "labels_before": [list(x.labels) for x in solutions],
    "labels_after": [list(x.solution.labels) for x in changed.attacked],
    "origins": [list(x.origin) for x in changed.attacked],
    "reports": reports,
    "problems": [base["problems"][i] for i in changed.indices],
  }


# --- what rows say ---


def auc_change(row: Row) -> judging.Statistic:
  """Returns the change of the AUC of a solution's own steps.

  Without steps that an attack put in: those are easy to tell, or impossible,
  which says nothing about the others.
  """
  own = [
    [None if old is None else x for x, old in zip(labels, origin, strict=True)]
    for labels, origin in zip(row["labels_after"], row["origins"], strict=True)
  ]
  before = judging.auc_of_labels(_arrays(row["before"]), row["labels_before"])
  after = judging.auc_of_labels(_arrays(row["after"]), own)
  return lambda weights: after(weights) - before(weights)


def new_errors(row: Row) -> judging.Statistic:
  """Returns the mean change of steps that the attack made wrong; or NaN."""
  parts = ("before", "after", "labels_before", "labels_after", "origins")
  changes, owners = [], []
  for i, (old, new, was, now, origin) in enumerate(
    zip(*(row[x] for x in parts), strict=True)
  ):
    for at, k in enumerate(origin):
      if k is not None and was[k] == 1 and now[at] == 0:
        changes.append(new[at] - old[k])
        owners.append(i)
  changed, owner = np.array(changes), np.array(owners, int)

  def mean(weights):
    own = weights[owner]
    return float(own @ changed / own.sum()) if own.sum() else np.nan

  return mean


def summary(row: Row) -> str:
  """Returns both AUCs of an attack's row."""
  report = next(iter(row["reports"].values()))
  auc = [report["auc_before"], report["auc_after"]]
  said = ["unknown" if x is None else f"{x:.3f}" for x in auc]
  return f"AUC {said[0]} before, {said[1]} after"


def sensitivity(attack: str, scorer: str, row: Row) -> dict[str, Any]:
  """Returns a line of what is still told apart after an attack."""
  report = next(iter(row["reports"].values()))
  return {
    "attack": attack,
    "scorer": scorer,
    "solutions": report["solutions"],
    "AUC before, %": _percent(report["auc_before"]),
    "AUC after, %": _percent(report["auc_after"]),
    "AUC change, own steps, points": _mean(row, auc_change),
    "change of right steps, points": _percent(report["right"]),
    "change of wrong steps, points": _percent(report["wrong"]),
    "change of new errors, points": _mean(row, new_errors),
  }


def inflation(attack: str, scorer: str, row: Row) -> dict[str, Any]:
  """Returns a line of what an attack does to scores of whole solutions."""
  line: dict[str, Any] = {"attack": attack, "scorer": scorer}
  for name, title in TRACES.items():
    report = row["reports"][name]
    line[f"{title}: change, points"] = _percent(report["inflation"])
    line[f"{title}: rises, wrong ones, %"] = _percent(report["inflated_wrong"])
  return line


def verdict(attack: str, scorer: str, row: Row) -> Verdict:
  """Returns whether an attack lowers what it is there to lower."""
  if attack == CONTROL:
    claim = (
      f"{attack}: lowers {scorer}'s scores of the steps that it makes wrong"
    )
    found = _interval(row, new_errors)
  else:
    claim = f"{attack}: lowers {scorer}'s AUC of a solution's own steps"
    found = _interval(row, auc_change)
  text = (
    f"{100 * found.value:+.1f} points ({100 * found.low:.1f} to"
    f" {100 * found.high:.1f}), {len(row['after'])} solutions of"
    f" {len(set(row['problems']))} problems"
  )
  holds = True if found.high < 0 else False if found.low > 0 else None
  return Verdict(claim, text, holds)


def _arrays(scores: Sequence[Sequence[float]]) -> list[np.ndarray]:
  return [np.array(x, float) for x in scores]


def _percent(value: float | None) -> float | None:
  return None if value is None else 100 * value


def _interval(
  row: Row, statistic: Callable[[Row], judging.Statistic]
) -> Estimate:
  found = statistic(row)
  value = found(np.ones(len(row["after"])))
  if value != value:  # there is nothing to resample
    problems = len(set(row["problems"]))
    return Estimate(value, value, value, problems, 1)
  return judging.estimate(found, row["problems"])


def _mean(
  row: Row, statistic: Callable[[Row], judging.Statistic]
) -> stats.Mean | None:
  found = _interval(row, statistic)
  if found.value != found.value:
    return None
  return stats.Mean(found.value, found.half).times(100)
