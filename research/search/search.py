"""Searches: which paths of a problem go on after a step, and how often.

A strategy is a value with two answers: how many paths to begin with, and how
many children each path has. `search` runs it for many problems at once.
Choosing among the samples at the end is another setting
(`research.search.choose`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from research.search.engine import Engine, Frontier, Path
from research.search.ledger import Ledger
from research.typing import PRNGKey, UserError


@runtime_checkable
class Strategy(Protocol):
  """What happens between two steps of a problem."""

  @property
  def copies(self) -> int:
    """Paths at the beginning, and at most at any time."""
    ...

  def children(self, paths: Sequence[Path]) -> Sequence[int]:
    """Returns how many paths go on from each of a problem's open paths.

    Args:
      paths: that have not ended, at least one.

    Returns:
      Numbers from 0 on, whose sum is at most `copies`.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Samples:
  """What a search found for one problem.

  Attributes:
    paths: complete ones, and those that ran out of tokens or steps.
    ledger: of all that was computed, dropped paths included.
  """

  paths: tuple[Path, ...]
  ledger: Ledger


def search(
  engine: Engine,
  strategy: Strategy,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  max_steps: int = 64,
  key: PRNGKey | None = None,
) -> list[Samples]:
  """Returns each problem's samples; problems are searched in one batch.

  Args:
    engine: policy and verifier.
    strategy: which paths go on.
    prompts: of the problems, token ids.
    max_new_tokens: of a path.
    max_steps: of a path; those that are open then are cut.
    key: random key of the sampling; seed 0 by default.

  Raises:
    UserError: the strategy asks for more children than it has paths.
  """
  copies = strategy.copies
  frontier = engine.start(prompts, max_new_tokens, copies, key)
  found: list[list[Path]] = [[] for _ in prompts]
  for step in range(1, max_steps + 1):
    rows, branch = [], []
    for i, paths in enumerate(found):
      slots = range(i * copies, (i + 1) * copies)
      opened = [row for row in slots if _open(frontier, row)]
      paths += [frontier.paths[row] for row in slots if _closed(frontier, row)]
      if step == max_steps:
        paths += [frontier.paths[row] for row in opened]
        continue
      counts = _children(strategy, [frontier.paths[row] for row in opened])
      for row, number in _slots(slots, dict(zip(opened, counts, strict=True))):
        rows.append(row)
        branch.append(number)
    if all(number == IDLE for number in branch):
      break
    frontier = engine.advance(_rearranged(engine, frontier, rows, branch))
  return [
    Samples(tuple(paths), ledger)
    for paths, ledger in zip(found, frontier.ledgers, strict=True)
  ]


IDLE = -1
"""In place of a branch: the row gets no more tokens."""


def _open(frontier: Frontier, row: int) -> bool:
  return frontier.fresh[row] and not frontier.paths[row].done


def _closed(frontier: Frontier, row: int) -> bool:
  return frontier.fresh[row] and frontier.paths[row].done


def _children(strategy: Strategy, paths: Sequence[Path]) -> list[int]:
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
    own = [k if k != IDLE else len(rows) for k in branch]
    frontier = engine.select(frontier, rows, own)
  idle = [k == IDLE for k in branch]
  return engine.end(frontier, idle) if any(idle) else frontier
