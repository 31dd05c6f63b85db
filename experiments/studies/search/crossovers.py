"""From which cost on a larger policy is ahead of a smaller one."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from experiments.studies.listed import NAMED
from experiments.studies.protocol import Lines, Row
from experiments.studies.search import systems
from experiments.studies.search.reports import Named, Report, RowsOf
from experiments.studies.search.systems import System
from research import intervals
from research.search.protocols import Curve, crossover

RESAMPLES = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossovers(Report):
  """Costs from which a larger policy's samples solve more than a smaller one's.

  Both have an exact check of their samples, so costs are the policies' alone.
  Between two numbers of samples accuracy is linear in the logarithm of the cost
  (`protocols.crossover`). Intervals are a bootstrap's over problems and seeds.

  Attributes:
    pools: independent samples, from the smallest policy to the largest one.
  """

  pools: Named = dataclasses.field(metadata=NAMED)

  @property
  def systems(self) -> Named:
    return self.pools

  def lines(self, rows_of: RowsOf) -> Lines:
    present = {x: rows_of(x) for x in self.pools}
    pools = [_Pool(x, rows) for x, rows in present.items() if rows]
    return [_line(*pair) for pair in itertools.combinations(pools, 2)]


class _Pool:
  """A policy's samples: what k of them cost, and solve."""

  def __init__(self, system: System, rows: Sequence[Row]):
    checked = [
      dataclasses.replace(system, checked=k)
      for k in range(1, int(rows[0]["n"]) + 1)
    ]
    self.name, self.seeds = system.name, len(rows)
    self.costs = tuple(sum(systems.flops_of(x, rows)) for x in checked)
    self.solved = np.array([systems.each_of(x, rows) for x in checked])

  def curve(self, seeds: np.ndarray, problems: np.ndarray) -> Curve:
    """Returns shares of problems that are solved, over FLOPs."""
    shares = self.solved[:, seeds[:, None], problems].mean(axis=(1, 2))
    return Curve(self.name, self.costs, tuple(shares.tolist()))


def _line(small: _Pool, large: _Pool) -> dict[str, float | int | str]:
  seeds, problems = (min(small.seeds, large.seeds), small.solved.shape[2])
  last = min(small.costs[-1], large.costs[-1])

  def cost(rows: np.ndarray, columns: np.ndarray) -> float:
    curves = [x.curve(rows, columns) for x in (small, large)]
    return crossover(*curves) or np.inf

  def bounded(rows: np.ndarray, columns: np.ndarray) -> float:
    return min(cost(rows, columns), last)

  everything = np.arange(seeds), np.arange(problems)
  if seeds > 1:
    interval = intervals.bootstrap(
      bounded, seeds, problems, resamples=RESAMPLES, vectorized=False
    )
  else:
    interval = intervals.bootstrap(
      lambda columns: bounded(np.array([0]), columns),
      problems,
      resamples=RESAMPLES,
      vectorized=False,
    )

  def shown(value: float) -> float | str:
    return value / 1e6 if value < last else f"beyond {last / 1e6:.4g}"

  measured = f"{large.costs[0] / 1e6:.4g} to {last / 1e6:.4g}"

  return {
    "smaller": small.name,
    "larger": large.name,
    "the larger one leads from, MFLOP": shown(cost(*everything)),
    "from": shown(interval.low),
    "to": shown(interval.high),
    "measured in both, MFLOP": measured,
    "seeds": f"{seeds}{interval.note}" if interval.note else seeds,
  }
