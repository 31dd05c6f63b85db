"""Lookahead: a step is worth what becomes of it (Snell et al. 2024, 5.2).

Each path goes on greedily for k more steps, whose last score becomes the score
of the step itself. The steps ahead are thrown away, but not their cost.
"""

import dataclasses
from typing import Any

from research.generation.decoding import GeneratedTokens
from research.generation.sampling import GREEDY
from research.search.engine import Engine, Frontier
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead(Engine):
  """An engine whose verifier judges steps by what follows them.

  Attributes:
    steps: k, how many steps ahead; 0 is `Engine`.
  """

  steps: int = 1

  def __post_init__(self):
    if self.steps < 0 or self.verifier is None:
      raise UserError(
        f"Lookahead: found {self.steps} steps and the verifier"
        f" {self.verifier!r:.40}, expected at least 0 and one"
      )

  def _with_tokens(
    self, frontier: Frontier, state: Any, drawn: GeneratedTokens
  ) -> Frontier:
    now = super()._with_tokens(_without_peaks(frontier), state, drawn)
    greedy = dataclasses.replace(self.policy, sampling=GREEDY)
    engine = Engine(
      policy=greedy,
      verifier=self.verifier,
      timeout=self.timeout,
      silent=self.silent,
    )
    rows = range(len(now.paths))
    # A copy: decoding uses up the buffers of what it begins with.
    ahead = engine.select(_without_peaks(now), rows, [0] * len(rows))
    last = {
      row: path.scores[-1] for row, path in enumerate(now.paths) if path.scores
    }
    for _ in range(self.steps):
      if all(path.done for path in ahead.paths):
        break
      ahead = engine.advance(ahead)
      last |= {
        row: ahead.paths[row].scores[-1] for row in rows if ahead.advanced[row]
      }
    paths = tuple(
      dataclasses.replace(path, scores=(*path.scores[:-1], last[row]))
      if now.advanced[row]
      else path
      for row, path in enumerate(now.paths)
    )
    peaks = [
      [ledger.peak_cache_tokens for ledger in x.ledgers]
      for x in (frontier, now, ahead)
    ]
    # What is thrown away is in the cache beside the rows; they share prompts.
    shared = {
      path.problem: self._cost.prompt(path.prompt).peak_cache_tokens
      for path in paths
    }
    ledgers = tuple(
      dataclasses.replace(
        ledger,
        peak_cache_tokens=max(before, step, step + rollout - shared.get(i, 0)),
      )
      for i, (ledger, before, step, rollout) in enumerate(
        zip(ahead.ledgers, *peaks, strict=True)
      )
    )
    return dataclasses.replace(now, paths=paths, ledgers=ledgers)


def _without_peaks(frontier: Frontier) -> Frontier:
  ledgers = tuple(
    dataclasses.replace(x, peak_cache_tokens=0) for x in frontier.ledgers
  )
  return dataclasses.replace(frontier, ledgers=ledgers)
