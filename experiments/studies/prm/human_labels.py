"""Scorers of steps, judged by the first wrong steps that people marked.

Each scorer is an arm. It is cross-validated by problem: what it learns, its
penalty and its threshold come from problems that it is not judged on. A scorer
and an attack are an arm as well: what the scorer, which learned from unchanged
solutions, says of attacked ones.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.core import stats
from experiments.studies import protocol
from experiments.studies.prm import attacking, judging
from experiments.studies.prm.scorers import Labelled, Scorer
from experiments.studies.prm.states import FrozenStates
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.prm.attacks import ATTACKS
from research.prm.labelled import LabelledSolution
from research.prm.scores import processbench
from research.typing import UserError


@runtime_checkable
class Solutions(Protocol):
  """A set of labelled solutions, such as `prm.Champ`."""

  def solutions(self) -> list[LabelledSolution]:
    """Returns them."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanLabels(protocol.Study):
  """Scorers of the same solutions.

  Attributes:
    data: solutions whose first wrong steps are known.
    states: the model whose states probes read.
    scorers: an arm each; verdicts compare the first one with each other.
    folds, inner: of the outer and the inner cross-validation.
    seed: of the partitions, and of the problems that are attacked.
    attacks: names of `prm.attacks.ATTACKS`; with each scorer another arm.
    attacked_problems: most problems whose solutions an attack changes, drawn
      from those with a solution that it can change; None for all.
  """

  data: Solutions
  states: FrozenStates
  scorers: tuple[Scorer, ...]
  folds: int = 5
  inner: int = 3
  seed: int = 0
  attacks: tuple[str, ...] = ()
  attacked_problems: int | None = None

  def __post_init__(self):
    attacking.check(self.attacks, self.attacked_problems)
    protocol.distinct(self.attacks, "HumanLabels.attacks")
    protocol.distinct(self.arms, "HumanLabels.scorers")
    for name in ("folds", "inner"):
      if getattr(self, name) < 2:
        raise UserError(
          f"HumanLabels.{name}: found {getattr(self, name)}, expected 2 or more"
        )

  @property
  def arms(self) -> list[str]:
    """The scorers' names, then those of each attack and scorer."""
    return [*self._names, *self._attacked]

  @property
  def _names(self) -> list[str]:
    return [x.name for x in self.scorers]

  @property
  def _attacked(self) -> dict[str, tuple[str, str]]:
    """Attack and scorer, by their arm's name."""
    return {
      f"{attack}: {name}": (attack, name)
      for attack in self.attacks
      for name in self._names
    }

  def _scorer(self, name: str) -> Scorer:
    return next(x for x in self.scorers if x.name == name)

  def settings(self, arm: str) -> str:
    """Returns the setup and one scorer, and an attack where there is one."""
    # Rows of unchanged solutions do not depend on attacks.
    without = "scorers", "attacks", "attacked_problems"
    attack, name = self._attacked.get(arm, (None, arm))
    setup = protocol.describe(self, *without)
    setup = f"{setup}, {protocol.describe(self._scorer(name))}"
    if attack is None:
      return setup
    change = protocol.describe(ATTACKS[attack])
    return f"{setup}, {change} of {self.attacked_problems} problems"

  def prepare(self, workdir: pathlib.Path) -> attacking.Prepared:
    """Returns the solutions with the model's states, which are stored.

    Raises:
      UserError: a solution's first wrong step is not known, there are fewer
        problems than folds, or an attack changes nothing.
    """
    found = self.data.solutions()
    for one in found:
      if one.first_error is None:
        raise UserError(
          f"HumanLabels.data: found a solution of {one.problem_id} with an"
          " unknown label before its first 0, expected all of them"
        )
    problems = len(set(judging.problems_of(found)))
    if problems < self.folds * self.inner:
      raise UserError(
        f"HumanLabels.data: found {problems} problems, expected at least"
        f" {self.folds * self.inner}, one for each fold of the folds"
      )
    data = Labelled(found, self.states.compute(found, workdir))
    return attacking.prepare(
      self.attacks,
      data,
      self.attacked_problems,
      self.seed,
      self.states,
      workdir,
    )

  def run(self, arm: str, before: Rows, shared: attacking.Prepared) -> Row:
    """Returns the scores of all steps, and where first errors are predicted.

    Of an attack, the scores before and after it.

    Raises:
      UserError: the row of an attack's scorer is not there yet.
    """
    if arm in self._attacked:
      return self._attack(arm, before, shared)
    data = shared.data
    found = judging.cross_validated(
      self._scorer(arm), data, self.folds, self.inner, self.seed
    )
    return {
      "scores": [np.round(x, 6).tolist() for x in found.scores],
      "predicted": found.predicted,
      "thresholds": found.thresholds,
      "strengths": found.strengths,
      "first_errors": [x.first_error for x in data.solutions],
      "problems": judging.problems_of(data.solutions),
      "authors": [x.policy_id for x in data.solutions],
    }

  def _attack(self, arm: str, before: Rows, shared: attacking.Prepared) -> Row:
    attack, name = self._attacked[arm]
    if name not in before:
      raise UserError(
        f"--only: found no row of {name!r}, expected it before {arm!r}: run"
        " that arm first, or both"
      )
    return attacking.row(
      self._scorer(name),
      shared.data,
      shared.changed[attack],
      before[name],
      self.folds,
      self.seed,
    )

  def summary(self, row: Row) -> str:
    """Returns F1 and AUC, or the AUCs of an attack."""
    if "reports" in row:
      return attacking.summary(row)
    ones = np.ones(len(row["problems"]))
    return f"F1 {_f1(row)(ones):.3f}, AUC {_auc(row)(ones):.3f}"

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each scorer."""
    return [_line(name, rows[name]) for name in self._names if name in rows]

  def tables(self, rows: Rows) -> list[Lines]:
    """Returns the table, one of the solutions' authors, and two of attacks."""
    own = {name: rows[name] for name in self._names if name in rows}
    found = [self.table(rows), _by_author(own)]
    attacked = [
      (*pair, rows[arm]) for arm, pair in self._attacked.items() if arm in rows
    ]
    if attacked:
      found.append([attacking.sensitivity(*x) for x in attacked])
      found.append([attacking.inflation(*x) for x in attacked])
    return found

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns whether the first scorer is better than each other one.

    And what each attack does to the first scorer.
    """
    first, *others = self._names
    compared = [
      _verdict(title, statistic, first, other, rows)
      for title, statistic in (("F1", _f1), ("AUC", _auc))
      for other in others
    ]
    attacked = [
      attacking.verdict(attack, name, rows[arm])
      for arm, (attack, name) in self._attacked.items()
      if name == first
    ]
    return [*compared, *attacked]


def _f1(row: Row) -> judging.Statistic:
  return judging.f1_of(row["predicted"], row["first_errors"])


def _auc(row: Row) -> judging.Statistic:
  scores = [np.array(x) for x in row["scores"]]
  return judging.auc_of(scores, row["first_errors"])


def _line(arm: str, row: Row) -> dict[str, Any]:
  parts = processbench(row["predicted"], row["first_errors"])
  found = {
    title: judging.estimate(statistic(row), row["problems"])
    for title, statistic in (("F1, %", _f1), ("AUC, %", _auc))
  }
  return {
    "scorer": arm,
    f"found of {parts.errors} wrong ones, %": 100 * parts.error,
    f"none in {parts.corrects} right ones, %": 100 * parts.correct,
  } | {
    title: stats.Mean(x.value, x.half).times(100) for title, x in found.items()
  }


def _by_author(rows: Rows) -> Lines:
  """Returns what each author's solutions are, and the AUC among them.

  A scorer that knows who wrote a step, and no more, is at 50% in each line.
  """
  if not rows:
    return []
  any_row = next(iter(rows.values()))
  authors = np.array(any_row["authors"])
  truth = np.array(any_row["first_errors"])
  return [
    {
      "author": author,
      "solutions": count,
      "wrong": int((truth[authors == author] >= 0).sum()),
    }
    | {
      f"AUC, {arm}, %": 100 * _auc(row)((authors == author).astype(float))
      for arm, row in rows.items()
    }
    for author, count in sorted(collections.Counter(authors.tolist()).items())
  ]


def _verdict(
  title: str,
  statistic: Callable[[Row], judging.Statistic],
  first: str,
  second: str,
  rows: Rows,
) -> Verdict:
  a, b = statistic(rows[first]), statistic(rows[second])
  problems: Sequence[str] = rows[first]["problems"]
  found = judging.estimate(lambda w: a(w) - b(w), problems)
  ones = np.ones(len(problems))
  text = (
    f"{100 * a(ones):.1f}% against {100 * b(ones):.1f}%:"
    f" {100 * found.value:+.1f} points ({100 * found.low:.1f} to"
    f" {100 * found.high:.1f}), {len(set(problems))} problems"
  )
  holds = True if found.low > 0 else False if found.high < 0 else None
  return Verdict(f"{title}: {first} above {second}", text, holds)
