"""Blocks of a diffusion policy that a verifier rejects are masked again.

An autoregressive path can only drop a bad step and draw another one. A masked
diffusion model can also mask part of a finished block, where it was least sure,
and fill it in again with the rest of the block in sight. Each path has its
blocks drawn again until the verifier is content or rounds are over, and has the
best one that was found; any search over steps goes on from there. A block that
is an end alone has no score of its own: it is neither masked again nor better
than another one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from research.ranges import NonNegativeInt, PositiveInt, PositiveShare, Ranged
from research.search.diffusion_policy import DiffusionPolicy
from research.search.engine import Engine, Frontier, Path, Verifier
from research.search.step_search import Limits, Samples, Strategy
from research.search.strategies.independent import Independent
from research.typing import PRNGKey, UserError


@runtime_checkable
class Rejection(Protocol):
  """Which new blocks are masked again."""

  def __call__(self, scores: Sequence[float]) -> Sequence[bool]:
    """Returns whether each block is.

    Args:
      scores: scores of the newest blocks of a problem's paths, at least one.
    """
    ...


@dataclasses.dataclass(frozen=True)
class BelowThreshold:
  """Those that score less than a threshold.

  Attributes:
    threshold: fixed before the test set is opened.
  """

  threshold: float | int = 0.5

  def __call__(self, scores: Sequence[float]) -> Sequence[bool]:
    return [score < self.threshold for score in scores]


@dataclasses.dataclass(frozen=True)
class AllButBest(Ranged):
  """All but the best ones of a problem; of equal ones the first.

  Attributes:
    keep: how many stay.
  """

  keep: PositiveInt = 1

  def __call__(self, scores: Sequence[float]) -> Sequence[bool]:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = set(order[: self.keep])
    return [i not in best for i in range(len(scores))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remasking(Ranged):
  """A search whose new blocks are masked again before it sees them.

  Attributes:
    inner: the search that goes on with the blocks.
    rejects: which blocks are masked again.
    rounds: most times that a block is masked again; 0 is `inner`.
    share: share of a block's tokens that are masked again, the least likely
      ones; 1 draws the block anew.
  """

  needs_scores: ClassVar[bool] = True
  inner: Strategy = Independent()
  rejects: Rejection = BelowThreshold()
  rounds: NonNegativeInt = 1
  share: PositiveShare = 1.0

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's samples; see `Strategy`.

    Raises:
      UserError: the policy cannot mask blocks again, or nothing judges them.
    """
    if not isinstance(engine.policy, DiffusionPolicy):
      raise UserError(
        f"Remasking: found the policy {type(engine.policy).__name__}, expected"
        " a DiffusionPolicy, whose blocks can be masked again"
      )
    if not isinstance(engine.verifier, Verifier):
      raise UserError(
        "Remasking: found no verifier, or one without rows of its own (a"
        " probe), expected one that reads blocks and rejects some"
      )
    again = _Engine(
      policy=engine.policy,
      verifier=engine.verifier,
      silent=engine.silent,
      inner=engine,
      search=self,
    )
    return self.inner(again, prompts, limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Engine(Engine):
  """An engine whose steps are what is left of several rounds.

  Attributes:
    inner: draws and judges each of them.
    search: the settings.
  """

  inner: Engine
  search: Remasking

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    copies: int,
    key: PRNGKey | None = None,
  ) -> Frontier:
    return self.advance(self.begin(prompts, max_new_tokens, copies, key))

  def advance(self, frontier: Frontier) -> Frontier:
    rows = range(len(frontier.paths))
    # Judging uses up the verifier's state, which each round needs again.
    before = self.verifier.select(frontier.verifier, rows)
    now = self.inner.advance(frontier)
    for draw in range(self.search.rounds):
      rejected = self._rejected(now, frontier.paths)
      if not any(rejected):
        break
      new = self._redrawn(now, rejected, frontier.paths, before, draw)
      now = self.store(
        now,
        new,
        [
          row
          if again
          and _has_score(new.paths[row], frontier.paths[row])
          and _last(new, row) > _last(now, row)
          else len(rows)
          for row, again in enumerate(rejected)
        ],
      )
    return now

  def _rejected(self, now: Frontier, before: Sequence[Path]) -> list[bool]:
    """Returns which rows have a new block that is masked again.

    Args:
      now: after the blocks.
    """
    rejections = [False] * len(now.paths)
    for problem in {path.problem for path in now.paths}:
      scored_rows = [
        row
        for row, path in enumerate(now.paths)
        if path.problem == problem
        and now.advanced[row]
        and _has_score(path, before[row])
      ]
      if scored_rows:
        verdicts = self.search.rejects([_last(now, row) for row in scored_rows])
        for row, rejected in zip(scored_rows, verdicts, strict=True):
          rejections[row] = bool(rejected)
    return rejections

  def _redrawn(
    self,
    now: Frontier,
    rejected: Sequence[bool],
    paths: Sequence[Path],
    verifier: Any,
    draw: int,
  ) -> Frontier:
    """Returns the frontier with other blocks in rows that are rejected.

    Args:
      now: after the blocks.
      rejected: which rows; others are idle.
      paths: before the blocks.
      verifier: its state then, which stays as it is.
      draw: the round: a row that kept its block draws another one in the next.
    """
    state = self.policy.remask(now.state, rejected, self.search.share, draw)
    before = dataclasses.replace(
      now,
      state=state,
      verifier=self.verifier.select(verifier, range(len(paths))),
      paths=tuple(paths),
    )
    idle = [not again for again in rejected]
    return self.inner.advance(self.inner.end(before, idle))


def _has_score(path: Path, before: Path) -> bool:
  """Whether a path's newest block has a score of its own."""
  return len(path.scores) > len(before.scores)


def _last(frontier: Frontier, row: int) -> float:
  return frontier.paths[row].scores[-1]
