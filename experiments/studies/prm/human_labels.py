"""Scorers of steps, judged by the first wrong steps that people marked.

Each scorer is an arm. It is cross-validated by problem: what it learns, its
penalty and its threshold come from problems that it is not judged on.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.core import stats
from experiments.studies import protocol
from experiments.studies.prm import judging
from experiments.studies.prm.scorers import Labelled, Scorer
from experiments.studies.prm.states import FrozenStates
from experiments.studies.protocol import Lines, Row, Rows, Verdict
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
    seed: of the partitions.
  """

  data: Solutions
  states: FrozenStates
  scorers: tuple[Scorer, ...]
  folds: int = 5
  inner: int = 3
  seed: int = 0

  def __post_init__(self):
    protocol.distinct(self.arms, "HumanLabels.scorers")
    for name in ("folds", "inner"):
      if getattr(self, name) < 2:
        raise UserError(
          f"HumanLabels.{name}: found {getattr(self, name)}, expected 2 or more"
        )

  @property
  def arms(self) -> list[str]:
    """The scorers' names."""
    return [x.name for x in self.scorers]

  def _scorer(self, arm: str) -> Scorer:
    return next(x for x in self.scorers if x.name == arm)

  def settings(self, arm: str) -> str:
    """Returns the setup and one scorer."""
    setup = protocol.describe(self, "scorers")
    return f"{setup}, {protocol.describe(self._scorer(arm))}"

  def prepare(self, workdir: pathlib.Path) -> Labelled:
    """Returns the solutions with the model's states, which are stored.

    Raises:
      UserError: a solution's first wrong step is not known, or there are fewer
        problems than folds.
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
    return Labelled(found, self.states.compute(found, workdir))

  def run(self, arm: str, before: Rows, shared: Labelled) -> Row:
    """Returns the scores of all steps, and where first errors are predicted."""
    del before
    found = judging.cross_validated(
      self._scorer(arm), shared, self.folds, self.inner, self.seed
    )
    return {
      "scores": [np.round(x, 6).tolist() for x in found.scores],
      "predicted": found.predicted,
      "thresholds": found.thresholds,
      "strengths": found.strengths,
      "first_errors": [x.first_error for x in shared.solutions],
      "problems": judging.problems_of(shared.solutions),
      "authors": [x.policy_id for x in shared.solutions],
    }

  def summary(self, row: Row) -> str:
    """Returns F1 and AUC."""
    ones = np.ones(len(row["problems"]))
    return f"F1 {_f1(row)(ones):.3f}, AUC {_auc(row)(ones):.3f}"

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each scorer."""
    return [_line(arm, rows[arm]) for arm in self.arms if arm in rows]

  def tables(self, rows: Rows) -> list[Lines]:
    """Returns the table, and one of the solutions' authors."""
    return [self.table(rows), _by_author(rows)]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns whether the first scorer is better than each other one."""
    first, *others = self.arms
    return [
      _verdict(title, statistic, first, other, rows)
      for title, statistic in (("F1", _f1), ("AUC", _auc))
      for other in others
    ]


def _f1(row: Row) -> judging.Statistic:
  return judging.f1_of(row["predicted"], row["first_errors"])


def _auc(row: Row) -> judging.Statistic:
  scores = [np.array(x) for x in row["scores"]]
  return judging.auc_of(scores, row["first_errors"])


def _line(arm: str, row: Row) -> dict[str, Any]:
  parts = processbench(row["predicted"], row["first_errors"])
  found = {
    title: judging.bootstrap(statistic(row), row["problems"])
    for title, statistic in (("F1, %", _f1), ("AUC, %", _auc))
  }
  return {
    "scorer": arm,
    f"found of {parts.errors} wrong ones, %": 100 * parts.error,
    f"none in {parts.corrects} right ones, %": 100 * parts.correct,
  } | {
    title: stats.Mean(x.value, (x.high - x.low) / 2).times(100)
    for title, x in found.items()
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
  found = judging.bootstrap(lambda w: a(w) - b(w), problems)
  ones = np.ones(len(problems))
  text = (
    f"{100 * a(ones):.1f}% against {100 * b(ones):.1f}%:"
    f" {100 * found.value:+.1f} points ({100 * found.low:.1f} to"
    f" {100 * found.high:.1f}), {len(set(problems))} problems"
  )
  holds = True if found.low > 0 else False if found.high < 0 else None
  return Verdict(f"{title}: {first} above {second}", text, holds)
