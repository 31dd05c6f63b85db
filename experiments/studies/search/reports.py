"""More tables of a study of commands: what its pools say besides accuracies."""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from experiments.core.stats import Mean
from experiments.studies.listed import NAMED, set_parts
from experiments.studies.protocol import Lines, Row
from experiments.studies.search import systems
from experiments.studies.search.systems import System
from research.search import optimal
from research.search.estimators import closed_forms, coverage
from research.search.estimators.intervals import paired_difference
from research.typing import UserError

RowsOf = Callable[[System], list[Row]]
"""A system's rows that are there, a seed after the other."""

Named = Sequence[System | str]
"""Systems, or their names in a study."""

LEVELS = "easy (from 50%)", "medium (from 10%)", "hard"
"""Names of the levels of `optimal.absolute_bins`."""


class Report(abc.ABC):
  """A table of a study of commands. Reports are frozen dataclasses."""

  systems: Named
  """Those whose rows it needs."""

  @abc.abstractmethod
  def lines(self, rows_of: RowsOf) -> Lines:
    """Returns the table; no lines where rows are missing."""

  def plot(self, rows_of: RowsOf, path: pathlib.Path) -> None:
    """Leaves a picture, if there is one to draw."""
    del rows_of, path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets(Report):
  """What fewer samples of a pool reach: pass@k, and votes of k.

  FLOPs are the policy's: neither asks a verifier, if the pool has one.
  Intervals are over problems, the larger half of each; of several seeds,
  their mean.

  Attributes:
    pools: of independent samples.
  """

  pools: Named = dataclasses.field(metadata=NAMED)

  @property
  def systems(self) -> Named:
    return self.pools

  def lines(self, rows_of: RowsOf) -> Lines:
    return [
      {
        "policy": pool.name,
        "samples": k,
        "any is right (pass@k), %": _estimate(rows, "pass", i),
        "vote (maj@k), %": _estimate(rows, "majority", i),
        "MFLOP a problem": systems.flops_of(
          dataclasses.replace(pool, checked=k), rows
        )[0]
        / 1e6,
      }
      for pool in self.pools
      if (rows := rows_of(pool))
      for i, k in enumerate(rows[0]["estimates"]["k"])
    ]


def _estimate(rows: Sequence[Row], name: str, index: int) -> Mean:
  each = np.array([row["estimates"][name][index] for row in rows], float)
  value, low, high = 100 * each.mean(axis=0)
  return Mean(float(value), float(max(value - low, high - value)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removed:
  """A system without one of its parts.

  Attributes:
    part: what is taken out; "" for none.
    system: what is left.
    models: steps that trained what it runs: a policy, and a reward model if it
      has one.
  """

  part: str
  system: System | str = dataclasses.field(metadata=NAMED)
  models: Named = dataclasses.field(metadata=NAMED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Report):
  """What each part of a system adds: it, and the same without each part.

  Differences are over problems and seeds, with 95% intervals of a bootstrap;
  the column of seeds says where these are too few for one.

  Attributes:
    whole: the system with all of its parts.
    without: the same without one of them each.
  """

  whole: Removed | Mapping[str, Any]
  without: Sequence[Removed | Mapping[str, Any]]

  def __post_init__(self):
    set_parts(self, whole=Removed, without=Removed)

  @property
  def systems(self) -> Named:
    """Those of all lines, and what trained their models."""
    every = (self.whole, *self.without)
    return tuple(x for one in every for x in (one.system, *one.models))

  def lines(self, rows_of: RowsOf) -> Lines:
    whole = rows_of(self.whole.system)
    if not whole:
      return []
    each = systems.each_of(self.whole.system, whole)
    lines = []
    for one in (self.whole, *self.without):
      rows = rows_of(one.system)
      if not rows:
        continue
      own = systems.each_of(one.system, rows)
      seeds = min(len(own), len(each))
      apart = paired_difference(own[:seeds], each[:seeds])
      shown = systems.line(one.system, rows)
      trained = [rows_of(model) for model in one.models]
      lines.append(
        {
          "without": one.part or "(nothing)",
          "right, %": shown["right, %"],
          "points": 100 * apart.value if one.part else "",
          "from": 100 * apart.low if one.part else "",
          "to": 100 * apart.high if one.part else "",
          "MFLOP a problem": shown["MFLOP a problem"],
          "KB of weights": _kilobytes(trained),
          "seeds": f"{len(rows)}{apart.note}" if apart.note else len(rows),
        }
      )
    return lines


def _kilobytes(trained: Sequence[Sequence[Row]]) -> float | str:
  if not all(trained):
    return ""
  return sum(rows[0]["parameter_bytes"] for rows in trained) / 1e3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDifficulty(Report):
  """Systems of equal cost, apart by how often the policy is right.

  The levels are of Liu et al. 2025 (arXiv:2502.06703). All but the first system
  have their distance from it, with the interval of a paired bootstrap over
  problems and seeds. The last lines have what choosing a system by the level
  reaches, cross-validated, beside the best system for all problems, and their
  distance; a problem alone in its level counts to the nearest.

  Attributes:
    pool: independent samples that no system shares: the levels are theirs. Of
      the samples that are judged, the lucky problems would be the easy ones.
  """

  pool: System | str = dataclasses.field(metadata=NAMED)
  compared: Named = dataclasses.field(metadata=NAMED)

  @property
  def systems(self) -> Named:
    return (self.pool, *self.compared)

  def lines(self, rows_of: RowsOf) -> Lines:
    rows = {x: rows_of(x) for x in self.systems}
    if not all(rows.values()):
      return []
    pass_rates = _pass_at_1(rows[self.pool])
    bins = optimal.absolute_bins(pass_rates)
    each = {x.name: systems.each_of(x, rows[x]) for x in self.compared}
    out = []
    for level, name in enumerate(LEVELS):
      which = bins == level
      if which.any():
        out.append(_level(name, which, each))
    out.append(_level("all", np.ones(len(bins), bool), each))
    means = np.array([x.mean(axis=0) for x in each.values()])
    return [*out, *_chosen(means, bins, list(each))]


def _pass_at_1(rows: Sequence[Row]) -> np.ndarray:
  shares = [np.divide(row["right"], row["samples"]) for row in rows]
  return np.mean(shares, axis=0)


def _level(name: str, which: np.ndarray, each: dict[str, np.ndarray]):
  line: dict[str, Any] = {"problems": name, "n": int(which.sum())}
  line |= {k: 100 * float(x[:, which].mean()) for k, x in each.items()}
  first, *others = each
  for other in others:
    seeds = min(len(each[first]), len(each[other]))
    a, b = (each[k][:seeds, which] for k in (other, first))
    line[f"{other}: points ahead of the first"] = _paired_points(a, b)
  return line


def _paired_points(first: np.ndarray, second: np.ndarray) -> Mean:
  """Returns a paired difference in points, and half of its interval."""
  difference = paired_difference(first, second)
  return Mean(difference.value, difference.half).times(100)


def _joined(bins: np.ndarray) -> np.ndarray:
  """Returns levels of which none has a single problem, if there are two."""
  joined = bins.copy()
  for level in np.unique(bins):
    others = np.unique(joined[joined != level])
    if (joined == level).sum() == 1 and len(others):
      joined[joined == level] = others[np.abs(others - level).argmin()]
  return joined


def _chosen(accuracy: np.ndarray, bins: np.ndarray, names: list[str]) -> Lines:
  chosen = optimal.compute_optimal(accuracy, _joined(bins))
  values = {
    "the best for each level, cross-validated": 100 * chosen.accuracy,
    "the best for all, cross-validated": 100 * chosen.best_single,
    "points between these two": _paired_points(
      chosen.per_problem, chosen.single_per_problem
    ),
  }
  n = int(accuracy.shape[1])
  return [
    {"problems": title, "n": n, names[0]: value}
    for title, value in values.items()
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extrapolated(Report):
  """Coverage of many samples, predicted from few (arXiv:2407.21787).

  Attributes:
    pool: independent samples.
    fitted: how many of each problem's samples the laws are fitted to.
    budgets: numbers of samples of the table, at most the pool's.
  """

  pool: System | str = dataclasses.field(metadata=NAMED)
  fitted: int = 16
  budgets: tuple[int, ...] = (1, 4, 16, 40, 80, 160)

  @property
  def systems(self) -> Named:
    return (self.pool,)

  def lines(self, rows_of: RowsOf) -> Lines:
    rows = rows_of(self.pool)
    if not rows:
      return []
    samples = np.array(rows[0]["samples"])
    right = np.array([row["right"] for row in rows])
    most = max(*self.budgets, self.fitted)
    if samples.min() < most:
      raise UserError(
        f"Extrapolated.budgets: found {most} samples, expected at most"
        f" {samples.min()}, those of {self.pool.name!r}"
      )
    # What was sampled first is a random subset of all.
    rng = np.random.default_rng(0)
    few = rng.hypergeometric(right[0], samples - right[0], self.fitted)
    sizes = np.full(len(few), self.fitted)
    beta = coverage.fit_beta(sizes, few)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= self.fitted]
    law = coverage.fit_power_law(ks, [_cover(sizes, few, k) for k in ks])
    return [
      {
        "samples": k,
        "measured, %": 100 * _cover(samples, right[0], k),
        f"power law of {self.fitted}": 100 * law(k),
        f"Beta of {self.fitted}": 100 * beta(k),
      }
      for k in self.budgets
    ]


def _cover(samples: np.ndarray, right: np.ndarray, k: int) -> float:
  row = {"samples": samples.tolist(), "right": right.tolist()}
  return float(systems.each_of(System(step="", checked=k), [row]).mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy:
  """Selection by a verifier that errs, against what a closed form predicts.

  Attributes:
    system: a choice among independent samples, by whether the last step is
      accepted.
    right: chance that a right solution is accepted.
    wrong: chance that a wrong one is.
  """

  system: System | str = dataclasses.field(metadata=NAMED)
  right: float | int
  wrong: float | int

  def line(self, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the accuracy, and that of `closed_forms.noisy_best_of_n`."""
    n = int(rows[0]["n"])
    beta = coverage.fit_beta(
      np.concatenate([row["samples"] for row in rows]),
      np.concatenate([row["right"] for row in rows]),
    )
    chances = scipy.stats.beta(beta.alpha, beta.beta).ppf(_MIDDLES)

    def predicted(k):
      rates = float(self.right), float(self.wrong)
      each = [
        closed_forms.noisy_best_of_n(float(p), *rates, k) for p in chances
      ]
      return 100 * float(np.mean(each))

    measured = systems.each_of(self.system, rows)
    return {
      "accepts right": float(self.right),
      "accepts wrong": float(self.wrong),
      "samples": n,
      "measured, %": 100 * float(measured.mean()),
      "predicted, %": predicted(n),
      "plateau, %": predicted(_ENDLESS),
    }


_ENDLESS = 10**6
_MIDDLES = (np.arange(2000) + 0.5) / 2000
"""Of equally likely chances of success."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisePlateau(Report):
  """Verifiers that err, and where more samples stop to help.

  Attributes:
    verifiers: each with its rates.
  """

  verifiers: Sequence[Noisy | Mapping[str, Any]]

  def __post_init__(self):
    set_parts(self, verifiers=Noisy)

  @property
  def systems(self) -> Named:
    return tuple(x.system for x in self.verifiers)

  def lines(self, rows_of: RowsOf) -> Lines:
    return [x.line(rows) for x in self.verifiers if (rows := rows_of(x.system))]
