"""Systems that answer problems: their accuracy, their cost, comparisons."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from experiments.core.stats import (
  MOST_SEEDS,
  Mean,
  above,
  common_seeds,
  equivalent,
  mean,
  over_seeds,
  seeds_to_decide,
)
from experiments.studies.listed import NAMED
from experiments.studies.protocol import Row, Verdict
from research.search.estimators import pool as estimators
from research.search.estimators.intervals import paired_difference
from research.typing import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """A search, and what decides which of its samples is given.

  Attributes:
    step: name of the search.
    title: of its line; "" for the name.
    checked: None, and the search's own choice decides; or a number of its
      independent samples, the first of which that an exact check of the final
      answer accepts is given. The check is free, and no verifier is called.
  """

  step: str
  title: str = ""
  checked: int | None = None

  @property
  def name(self) -> str:
    """Its title, or else its step's name."""
    return self.title or self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """A claim: a system is better than another, or as good.

  Attributes:
    claim: a sentence.
    first: the system that is better.
    second: than this one.
    within: the first one costs at most so many times the second one's FLOPs,
      verifier included; None where cost is not compared.
    least: difference of the shares of right answers.
    holds: `above`, the first is better by more than `least`; `within`, they
      are apart by less than it.
  """

  claim: str
  first: System | str = dataclasses.field(metadata=NAMED)
  second: System | str = dataclasses.field(metadata=NAMED)
  within: float | int | None = None
  least: float | int = 0.0
  holds: Literal["above", "within"] = "above"


def each_of(system: System, rows: Sequence[Row]) -> Float[np.ndarray, "S P"]:
  """Returns each problem's share of right answers, a row a seed."""
  if system.checked is None:
    return np.array([row["each"] for row in rows], float)
  k = system.checked
  return np.array(
    [
      [
        estimators.pass_at_k(n, right, k)
        for n, right in zip(row["samples"], row["right"], strict=True)
      ]
      for row in rows
    ],
    float,
  )


def flops_of(system: System, rows: Sequence[Row]) -> tuple[float, float]:
  """Returns FLOPs a problem, of the policy and of the verifier."""
  policy = float(np.mean([row["flops_policy"] for row in rows]))
  if system.checked is None:
    return policy, float(np.mean([row["flops_verifier"] for row in rows]))
  once = float(np.mean([row["prompt_flops_policy"] for row in rows]))
  share = system.checked / _chosen_among(rows)
  return once + share * (policy - once), 0.0


def _chosen_among(rows: Sequence[Row]) -> float:
  """Returns the number of samples whose FLOPs rows have, of a pool of more."""
  return float(np.mean([row["n"] for row in rows]))


def line(system: System, rows: Sequence[Row]) -> dict[str, Any]:
  """Returns a system's line of the table."""
  policy, verifier = flops_of(system, rows)
  samples = system.checked or _chosen_among(rows)
  return {
    "system": system.name,
    "samples": round(float(samples), 1),
    "right, %": over_seeds(each_of(system, rows).mean(axis=1), 100),
    "MFLOP a problem": (policy + verifier) / 1e6,
    "of these verifier, %": 100 * verifier / (policy + verifier),
    "seeds": len(rows),
  }


def verdict(
  comparison: Comparison, first: Sequence[Row], second: Sequence[Row]
) -> Verdict:
  """Returns whether a claim holds, by a bootstrap over problems and seeds.

  A system of one seed is compared with each seed of the other. Two of one seed
  decide nothing, whatever their interval over problems. Nor does a bootstrap of
  a few seeds alone: its ends are no further out than the outermost seed, so
  with three it misses the truth a fourth of the time where seeds differ more
  than problems do. Student's interval over seeds has to agree.
  """
  a, b = (
    each_of(system, rows)
    for system, rows in (
      (comparison.first, first),
      (comparison.second, second),
    )
  )
  counts = len(a), len(b)
  seeds = common_seeds(f"Comparison {comparison.claim!r}", *counts)
  a, b = (np.broadcast_to(x, (seeds, x.shape[1])) for x in (a, b))
  found = paired_difference(a, b)
  over = mean((a - b).mean(axis=1))
  ratio = sum(flops_of(comparison.first, first)) / sum(
    flops_of(comparison.second, second)
  )
  count = seeds if len({*counts}) == 1 else f"{counts[0]} and {counts[1]}"
  count = f"{count} seeds"
  if seeds > 1:
    count += f" (± {100 * over.half:.1f} over seeds alone)"
  text = (
    f"{100 * a.mean():.1f}% against {100 * b.mean():.1f}%:"
    f" {100 * found.value:+.1f} points ({100 * found.low:.1f} to"
    f" {100 * found.high:.1f}){found.note}, {found.problems} problems,"
    f" {count}, at {ratio:.2f} times the FLOPs"
  )
  if comparison.within is not None and ratio > comparison.within:
    return Verdict(comparison.claim, f"{text}: too many", False)
  decide = equivalent if comparison.holds == "within" else above
  by_seeds = decide(over, comparison.least)
  # The larger half: a bootstrap's interval need not be symmetric.
  by_problems = decide(Mean(found.value, found.half), comparison.least)
  holds = by_seeds if by_seeds == by_problems else None
  if holds is None and seeds > 1 and comparison.holds == "above":
    n = seeds_to_decide(over, seeds, comparison.least)
    text += f"; {n} seeds would decide" if n < MOST_SEEDS else ""
  return Verdict(comparison.claim, text, holds)
