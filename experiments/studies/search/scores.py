"""Tables of a study of commands: what scores of solutions tell, and choose."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.core.stats import over_seeds
from experiments.studies.listed import NAMED
from experiments.studies.protocol import Lines
from experiments.studies.search.reports import Named, Report, RowsOf
from research.prm.scores.aggregate import AGGREGATES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModels(Report):
  """How well reward models find first errors, on the test solutions.

  Attributes:
    systems: steps that trained one.
  """

  systems: Named = dataclasses.field(metadata=NAMED)

  def lines(self, rows_of: RowsOf) -> Lines:
    """Returns a line for each model that is there, and one of chance."""
    every = [(x.name, rows) for x in self.systems if (rows := rows_of(x))]
    # All models of a seed are tested on the same solutions; rows of older
    # evaluations do not say what chance reaches there.
    most = max((rows for _, rows in every), key=len, default=[])
    if chance := [x["f1_random"] for x in most if "f1_random" in x]:
      rows = [{"f1": f1, "auc": 0.5} for f1 in chance]
      every.append(("nothing: random scores", rows))
    return [
      {
        "learned": name,
        "F1 of first errors, %": over_seeds([x["f1"] for x in rows], 100),
        "AUC, %": over_seeds([x["auc"] for x in rows], 100),
        "seeds": len(rows),
      }
      for name, rows in every
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongSolutions(Report):
  """What is wrong with solutions, and how often scores see it.

  Attributes:
    systems: choices by scores among samples of one policy.
    least: share of all samples that a kind needs for a line of its own.
  """

  systems: Named = dataclasses.field(metadata=NAMED)
  least: float | int = 0.02

  def lines(self, rows_of: RowsOf) -> Lines:
    rows = {x: rows_of(x) for x in self.systems}
    if not all(rows.values()):
      return []
    first = rows[self.systems[0]][0]["wrong"]
    kinds = [k for k, x in first.items() if x["share"] >= self.least]
    return [
      {"what is wrong": kind, "of all samples, %": 100 * first[kind]["share"]}
      | {x.name: _seen(rows[x][0]["wrong"].get(kind)) for x in self.systems}
      for kind in kinds
    ]


def _seen(kind: Mapping[str, Any] | None) -> float | None:
  if kind is None or kind["below"] is None:
    return None
  return 100 * kind["below"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreErrors(Report):
  """What scores choose, beside scores whose errors are independent.

  A choice by scores is as good as they tell right from wrong solutions *of one
  problem*; the columns say what scores of the same AUC would choose if their
  errors had nothing to do with the problem (`wrong_answers.errors_of`).

  Attributes:
    systems: choices by scores among all samples of a pool.
  """

  systems: Named = dataclasses.field(metadata=NAMED)

  def lines(self, rows_of: RowsOf) -> Lines:
    columns = {
      "AUC, %": "auc",
      "AUC within a problem, %": "auc_within",
      "independent errors, %": "independent",
      "normal scores of this AUC, %": "binormal",
      "perfect, %": "perfect",
    }
    return [
      {
        "chosen by": system.name,
        "right, %": over_seeds([row["accuracy"] for row in rows], 100),
      }
      | {
        title: over_seeds([row["errors"][name] for row in rows], 100)
        for title, name in columns.items()
      }
      | {"seeds": len(rows)}
      for system in self.systems
      if (rows := rows_of(system))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregations(Report):
  """Best-of-n by each way to make one score of a solution's steps.

  Attributes:
    pools: of independent samples with scores.
  """

  pools: Named = dataclasses.field(metadata=NAMED)

  @property
  def systems(self) -> Named:
    return self.pools

  def lines(self, rows_of: RowsOf) -> Lines:
    return [
      {"scores": pool.name}
      | {
        f"{name}, %": over_seeds(
          [row["estimates"][f"best_of/{name}"][-1][0] for row in rows], 100
        )
        for name in AGGREGATES
      }
      | {
        "vote, %": over_seeds(
          [row["estimates"]["majority"][-1][0] for row in rows], 100
        )
      }
      for pool in self.pools
      if (rows := rows_of(pool))
    ]
