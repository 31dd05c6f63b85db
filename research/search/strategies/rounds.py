"""Rounds of new prompts that are made of earlier solutions.

Sequential revision (Snell et al. 2024, arXiv:2408.03314, section 6): each chain
is shown its last tries and tries again. Recursive self-aggregation (RSA,
Venkatraman et al. 2025, arXiv:2509.26626): a population of solutions, each of
whose successors is shown some of the population. Both are a way to pick the
solutions that a prompt shows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from research.ranges import PositiveInt, Ranged
from research.search.engine import Engine, Path
from research.search.ledger import Ledger
from research.search.step_search import Limits, Samples
from research.search.strategies.independent import Independent

Rewrite = Callable[[Sequence[int], Sequence[Path]], Sequence[int]]
"""(a problem's prompt, earlier solutions) -> the prompt that shows them."""


@runtime_checkable
class HistorySelector(Protocol):
  """Which earlier solutions the prompts of a round show."""

  def __call__(
    self, history: Sequence[Sequence[Path]], rng: np.random.Generator
  ) -> list[list[Path]]:
    """Returns the solutions that each of a problem's new prompts shows.

    Args:
      history: the solutions of each round, as many in each.
      rng: for random choices.
    """
    ...


@dataclasses.dataclass(frozen=True)
class LastTries(Ranged):
  """Each chain its own last tries, the oldest first.

  Attributes:
    max_tries: tries that are shown; 4 in Snell et al.
  """

  max_tries: PositiveInt = 4

  def __call__(
    self, history: Sequence[Sequence[Path]], rng: np.random.Generator
  ) -> list[list[Path]]:
    del rng
    return [
      list(chain)[-self.max_tries :] for chain in zip(*history, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Subsets(Ranged):
  """A random subset of the last round's solutions, for each new one.

  Attributes:
    size: solutions of a subset; K of RSA.
  """

  size: PositiveInt = 4

  def __call__(
    self, history: Sequence[Sequence[Path]], rng: np.random.Generator
  ) -> list[list[Path]]:
    last = history[-1]
    size = min(self.size, len(last))
    return [
      [last[i] for i in rng.choice(len(last), size, replace=False)]
      for _ in last
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(Ranged):
  """Solutions, and solutions of prompts that show solutions.

  Attributes:
    rewrite: makes the prompt.
    shown: `LastTries()` for revision, `Subsets()` for RSA.
    width: solutions of a round.
    rounds: number of rounds.
    every: whether earlier rounds' solutions are samples as well: for revision,
      which turns right answers wrong, too; RSA has those of the last round.
    seed: random seed of the subsets.
  """

  rewrite: Rewrite
  shown: HistorySelector = LastTries()
  width: PositiveInt = 4
  rounds: PositiveInt = 4
  every: bool = True
  seed: int = 0

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's solutions; see `Strategy`."""
    key = jax.random.key(0) if limits.key is None else limits.key
    rng = np.random.default_rng(self.seed)
    first = Independent(copies=self.width)(engine, prompts, limits)
    history = [[_in_order(samples.paths)] for samples in first]
    ledgers = [samples.ledger for samples in first]
    for k in range(1, self.rounds):
      new_prompts = [
        self.rewrite(prompt, shown)
        for prompt, rounds in zip(prompts, history, strict=True)
        for shown in self.shown(rounds, rng)
      ]
      round_limits = dataclasses.replace(limits, key=jax.random.fold_in(key, k))
      solutions = Independent(copies=1)(engine, new_prompts, round_limits)
      for i, rounds in enumerate(history):
        part = solutions[i * self.width : (i + 1) * self.width]
        rounds.append(
          [
            dataclasses.replace(samples.paths[0], problem=i, root=root)
            for root, samples in enumerate(part)
          ]
        )
        ledgers[i] += _together([samples.ledger for samples in part])
    first = 0 if self.every else -1
    return [
      Samples(tuple(path for paths in rounds[first:] for path in paths), ledger)
      for rounds, ledger in zip(history, ledgers, strict=True)
    ]


def _in_order(paths: Sequence[Path]) -> list[Path]:
  return sorted(paths, key=lambda path: path.root)


def _together(ledgers: Sequence[Ledger]) -> Ledger:
  total = ledgers[0]
  for ledger in ledgers[1:]:
    total = total.alongside(ledger)
  return total
