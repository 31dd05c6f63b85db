"""Policies that learn from rewards: what they earn, and what is right of it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.studies.listed import NAMED
from experiments.studies.protocol import Lines, Row
from experiments.studies.search.reports import Named, Report, RowsOf
from research.prm.scored_task import VERIFIED
from research.training.reports import metrics, plots

POINTS = 30
"""Of a curve: means over as many equal parts of a training."""


def curves_of(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the curves of a run that learned from rewards; {} for others.

  Returns:
    `curves`: `step`, `reward` and `verified`, the share of right answers, at
    most `POINTS` each. Where the reward is the verdict, both are the same.
  """
  lines = metrics.read_jsonl(workdir / "metrics.jsonl")  # stages have theirs
  rounds = [x for x in lines if "train/reward" in x]
  if not rounds:
    return {}
  reward = [x["train/reward"] for x in rounds]
  named = {
    "step": [x["step"] for x in rounds],
    "reward": reward,
    "verified": [
      x.get(f"train/{VERIFIED}", earned)
      for x, earned in zip(rounds, reward, strict=True)
    ],
  }
  parts = min(POINTS, len(rounds))
  return {
    "curves": {
      name: [float(np.mean(x)) for x in np.array_split(values, parts)]
      for name, values in named.items()
    }
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimized(Report):
  """Rewards that policies were optimized for, beside exact verdicts.

  Attributes:
    systems: steps that trained a policy by rewards.
  """

  systems: Named = dataclasses.field(metadata=NAMED)

  def lines(self, rows_of: RowsOf) -> Lines:
    return [
      {
        "reward": system.name,
        "earned at first": _end(rows, "reward", 0),
        "at last": _end(rows, "reward", -1),
        "right at first, %": 100 * _end(rows, "verified", 0),
        "at last, %": 100 * _end(rows, "verified", -1),
        "held out, greedy, %": 100 * _mean(rows, "greedy"),
        "sampled, %": 100 * _mean(rows, "sampled"),
      }
      for system in self.systems
      if (rows := rows_of(system))
    ]

  def plot(self, rows_of: RowsOf, path: pathlib.Path) -> None:
    """Draws rewards above, shares of right answers below."""
    rows = {x: rows_of(x) for x in self.systems}
    if not any(rows.values()):
      return
    drawn = plots.figure(7, 6)
    upper, lower = drawn.subplots(2, sharex=True)
    for i, (system, own) in enumerate(rows.items()):
      for seed, row in enumerate(own):
        curves = row["curves"]
        style = plots.style(i) | {"lw": 1.2}
        name = system.name if seed == 0 else None
        upper.plot(curves["step"], curves["reward"], label=name, **style)
        lower.plot(curves["step"], 100 * np.array(curves["verified"]), **style)
    upper.set(ylabel="reward")
    lower.set(ylabel="right, %", xlabel="step", ylim=(0, None))
    upper.legend(frameon=False, fontsize=8)
    for axes in (upper, lower):
      axes.grid(alpha=0.3)
    plots.save(drawn, path)


def _end(rows: Sequence[Row], name: str, at: int) -> float:
  return float(np.mean([row["curves"][name][at] for row in rows]))


def _mean(rows: Sequence[Row], name: str) -> float:
  return float(np.mean([row["answers"][name] for row in rows]))
