"""Lookahead: a step is worth what becomes of it (Snell et al. 2024, 5.2).

Each path goes on greedily for k more steps, whose last score becomes the score
of the step itself. The steps ahead are thrown away, but not their cost.
"""

import dataclasses
from typing import Any

from research.generation.decoding import Drawn
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
    self, frontier: Frontier, state: Any, drawn: Drawn
  ) -> Frontier:
    now = super()._with_tokens(frontier, state, drawn)
    greedy = dataclasses.replace(self.policy, sampling=GREEDY)
    engine = Engine(policy=greedy, verifier=self.verifier, timeout=self.timeout)
    rows = range(len(now.paths))
    # A copy: decoding uses up the buffers of what it begins with.
    ahead = engine.select(now, rows, [0] * len(rows))
    last = {
      row: path.scores[-1] for row, path in enumerate(now.paths) if path.scores
    }
    for _ in range(self.steps):
      if all(path.done for path in ahead.paths):
        break
      ahead = engine.advance(ahead)
      last |= {
        row: ahead.paths[row].scores[-1] for row in rows if ahead.fresh[row]
      }
    paths = tuple(
      dataclasses.replace(path, scores=(*path.scores[:-1], last[row]))
      if now.fresh[row]
      else path
      for row, path in enumerate(now.paths)
    )
    return dataclasses.replace(now, paths=paths, ledgers=ahead.ledgers)
