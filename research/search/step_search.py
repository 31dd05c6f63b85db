"""Searches: which paths of a problem go on after a step, and how often.

A strategy is a callable: (engine, prompts, limits) -> samples of each problem,
and what they cost. Most are a `StepSearch`, a rule which paths go on after each
step. All problems are one batch. Choosing among the samples at the end is
another setting (`research.search.choose`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from research.ranges import PositiveInt, Ranged
from research.search.engine import Engine, Frontier, Path
from research.search.ledger import Ledger
from research.typing import PRNGKey, UserError


@dataclasses.dataclass(frozen=True)
class Samples:
  """What a search found for one problem.

  Attributes:
    paths: complete ones, and those that ran out of tokens or steps.
    ledger: cost of the whole search, dropped paths included.
  """

  paths: tuple[Path, ...]
  ledger: Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """How far paths may go, and the randomness.

  Attributes:
    tokens: most tokens of a path.
    steps: most steps of a path; those that are open then are cut.
    key: random key of the sampling; seed 0 by default.
  """

  tokens: int
  steps: int = 64
  key: PRNGKey | None = None


@runtime_checkable
class Strategy(Protocol):
  """A search."""

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's samples.

    Args:
      prompts: token ids of each problem.
    """
    ...


@runtime_checkable
class UsesScores(Protocol):
  """A strategy or a choice that may need a verifier's scores of steps."""

  @property
  def needs_scores(self) -> bool:
    """Whether it has no meaning without them."""
    ...


def check_scores(part: Any, engine: Engine) -> None:
  """Raises UserError if a strategy needs scores and there is no verifier."""
  if engine.verifier is None and needs_scores(part):
    raise UserError(
      f"{type(part).__name__}: found no verifier, expected one: it goes by the"
      " scores of steps.\nGive the engine a verifier, or sample independently"
    )


def needs_scores(part: Any) -> bool:
  """Whether a strategy or a choice has no meaning without a verifier."""
  return isinstance(part, UsesScores) and part.needs_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSearch(Ranged):
  """A search that says after each step how many children each path has.

  Attributes:
    copies: paths of a problem at the beginning, and at most at any time.
  """

  copies: PositiveInt = 16

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns how many paths go on from each of a problem's open paths.

    Args:
      paths: that have not ended, at least one.

    Returns:
      Numbers from 0 on, whose sum is at most `copies`.
    """
    raise NotImplementedError

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's samples; see `Strategy`.

    Raises:
      UserError: more children than `copies`, or no verifier for a search that
        goes by scores.
    """
    check_scores(self, engine)
    frontier = engine.start(prompts, limits.tokens, self.copies, limits.key)
    paths_by_problem: list[list[Path]] = [[] for _ in prompts]
    for step in range(1, limits.steps + 1):
      rows, branch = [], []
      for i, paths in enumerate(paths_by_problem):
        slots = range(i * self.copies, (i + 1) * self.copies)
        advanced = [row for row in slots if frontier.advanced[row]]
        opened = [row for row in advanced if not frontier.paths[row].done]
        paths += [x for row in advanced if (x := frontier.paths[row]).done]
        if step == limits.steps:
          paths += [frontier.paths[row] for row in opened]
          continue
        counts = _children(self, [frontier.paths[row] for row in opened])
        for row, k in _slots(slots, dict(zip(opened, counts, strict=True))):
          rows.append(row)
          branch.append(k)
      if all(k == IDLE for k in branch):
        break
      frontier = engine.advance(_rearranged(engine, frontier, rows, branch))
    return [
      Samples(tuple(paths), ledger)
      for paths, ledger in zip(paths_by_problem, frontier.ledgers, strict=True)
    ]


IDLE = -1
"""In place of a branch: the row gets no more tokens."""


def _children(strategy: StepSearch, paths: Sequence[Path]) -> list[int]:
  if not paths:
    return []
  counts = list(strategy.children(paths))
  if (
    len(counts) != len(paths)
    or min(counts) < 0
    or sum(counts) > strategy.copies
  ):
    raise UserError(
      f"{type(strategy).__name__}: found {counts} children of {len(paths)}"
      f" paths, expected a number for each, at most {strategy.copies} together"
    )
  return counts


def _slots(
  slots: Sequence[int], counts: Mapping[int, int]
) -> Iterator[tuple[int, int]]:
  """Yields the row and branch of each slot of a problem.

  A path's first child stays in its slot, so that nothing moves where every path
  has one child.
  """
  more = [(row, k) for row, n in counts.items() for k in range(1, n)]
  for slot in slots:
    if counts.get(slot, 0):
      yield slot, 0
    else:
      yield more.pop(0) if more else (slot, IDLE)


def _rearranged(
  engine: Engine,
  frontier: Frontier,
  rows: Sequence[int],
  branch: Sequence[int],
) -> Frontier:
  """Returns the frontier whose rows go on as these branches."""
  if list(rows) != list(range(len(rows))):
    # An idle row is nobody's child: any branch that is not another's will do.
    branches = [k if k != IDLE else len(rows) for k in branch]
    frontier = engine.select(frontier, rows, branches)
  idle = [k == IDLE for k in branch]
  return engine.end(frontier, idle) if any(idle) else frontier
