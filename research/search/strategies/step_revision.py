"""Solutions that are revised from their first wrong step on.

`Rounds` shows a model its earlier texts, and has it write a whole new one
(Snell et al. 2024, arXiv:2408.03314, section 6). Here the verifier says where a
solution went wrong: the steps before stay, with their cache and scores, and
what follows is drawn again. No step is read twice, and the policy needs no
training in revision.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from research.ranges import NonNegativeInt, PositiveInt, Ranged
from research.search.engine import Engine, Frontier, Path
from research.search.ledger import Ledger
from research.search.step_search import Limits, Samples, check_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRevision(Ranged):
  """Chains of tries, each of which keeps the right steps of the last one.

  Attributes:
    copies: chains of a problem.
    rounds: revisions of a chain at most; 0 is `Independent`.
    threshold: a step that scores less is wrong.
    every: whether earlier tries are samples as well; else each chain has its
      last try.
  """

  needs_scores: ClassVar[bool] = True
  copies: PositiveInt = 4
  rounds: NonNegativeInt = 2
  threshold: float | int = 0.5
  every: bool = True

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's tries, the first ones first; see `Strategy`."""
    check_scores(self, engine)
    now = engine.begin(prompts, limits.tokens, self.copies, limits.key)
    rows = range(len(now.paths))
    # Each chain before the first wrong step of its last try.
    stored = engine.select(now, rows, [0] * len(rows))
    revised = [True] * len(rows)
    tries: list[list[Path]] = [[] for _ in prompts]
    for k in range(1, self.rounds + 2):
      now, stored, wrong = self._try(engine, now, stored, revised, limits.steps)
      for path, is_revised in zip(now.paths, revised, strict=True):
        tries[path.problem] += [path] * is_revised
      revised = wrong
      if k > self.rounds or not any(wrong):
        break
      before = dataclasses.replace(stored, ledgers=now.ledgers)
      # Other random keys than those of the last try.
      now = engine.select(before, rows, [k] * len(rows))
    # What may be gone back to is in the cache beside the chains.
    other_tokens = [0] * len(prompts)
    for path in stored.paths:
      other_tokens[path.problem] += len(path.tokens)
    return [
      self._samples(paths, ledger, stored_tokens)
      for paths, ledger, stored_tokens in zip(
        tries, now.ledgers, other_tokens, strict=True
      )
    ]

  def _try(
    self,
    engine: Engine,
    now: Frontier,
    stored: Frontier,
    revised: Sequence[bool],
    steps: int,
  ) -> tuple[Frontier, Frontier, list[bool]]:
    """Lets chains go on to their ends.

    Args:
      now: the chains; its buffers are used up, as those of `stored`.
      stored: states to go back to.
      revised: which chains go on; others are idle.
      steps: most steps of a path.

    Returns:
      The chains at their ends, states to go back to, and which chains have a
      wrong step.
    """
    rows, wrong = range(len(now.paths)), [False] * len(now.paths)
    while True:
      opened = [
        go and not path.done and len(path.steps) < steps
        for go, path in zip(revised, now.paths, strict=True)
      ]
      if not any(opened):
        return now, stored, wrong
      if not all(opened):
        now = engine.end(now, [not go for go in opened])
      before = engine.select(now, rows, [0] * len(rows))
      now = engine.advance(now)
      new = [
        opened[row] and not wrong[row] and self._is_wrong(now.paths[row])
        for row in rows
      ]
      if any(new):
        places = [row if new[row] else len(rows) for row in rows]
        stored = engine.store(stored, before, places)
        wrong = [x or y for x, y in zip(wrong, new, strict=True)]

  def _is_wrong(self, path: Path) -> bool:
    return any(score < self.threshold for score in path.scores)

  def _samples(
    self, paths: Sequence[Path], ledger: Ledger, other_tokens: int
  ) -> Samples:
    """Returns a problem's samples, of all its tries in their order."""
    last = {path.root: path for path in paths}
    peak = ledger.peak_cache_tokens + other_tokens
    return Samples(
      tuple(paths if self.every else last.values()),
      dataclasses.replace(ledger, peak_cache_tokens=peak),
    )
