"""Self-consistency that stops when the vote is decided.

Samples come in rounds, until the answer in front would stay there with a given
probability (Aggarwal et al. 2023, "Let's sample step by step",
arXiv:2305.11860: the posterior of a Beta distribution over the two most
frequent answers). A batch runs until its last problem is decided, and costs
what it ran: easy problems are cheap among themselves, or in batches of one.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import jax
import scipy

from research.ranges import PositiveInt, Ranged, Real
from research.search.choose import answers_of
from research.search.engine import Engine, Path
from research.search.ledger import Ledger
from research.search.step_search import Limits, Samples
from research.search.strategies.independent import Independent
from research.typing import UserError


def lead(answers: Sequence[Hashable | None]) -> float:
  """Returns the probability that the most frequent answer stays in front.

  `P(p > 1/2)` for `p ~ Beta(a + 1, b + 1)`, where a and b are the counts of the
  two most frequent answers; 0 without answers.
  """
  votes = [answer for answer in answers if answer is not None]
  counts = sorted((votes.count(x) for x in set(votes)), reverse=True)
  if not counts:
    return 0.0
  second = counts[1] if len(counts) > 1 else 0
  return float(scipy.stats.beta.sf(0.5, counts[0] + 1, second + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive(Ranged):
  """Rounds of independent samples, for the problems that are undecided.

  Attributes:
    answer: extracts a path's answer, in canonical form, or None.
    round: samples of a round.
    max_samples: samples of a problem, a multiple of `round`.
    confidence: probability at which a vote is decided.
  """

  answer: Callable[[Path], Hashable | None]
  round: PositiveInt = 4
  max_samples: PositiveInt = 32
  confidence: Real(above=0.5, below=1) = 0.95

  def __post_init__(self):
    super().__post_init__()
    if self.max_samples % self.round:
      raise UserError(
        f"Adaptive: found rounds of {self.round} and at most {self.max_samples}"
        " samples, expected a multiple"
      )

  def __call__(
    self, engine: Engine, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[Samples]:
    """Returns each problem's samples; see `Strategy`."""
    key = jax.random.key(0) if limits.key is None else limits.key
    samples = [Samples((), Ledger()) for _ in prompts]
    for k in range(self.max_samples // self.round):
      opened = [i for i, x in enumerate(samples) if not self._decided(x)]
      if not opened:
        break
      # All problems, so that each has its index, and all rounds their programs.
      drawn = Independent(copies=self.round)(
        engine,
        prompts,
        dataclasses.replace(limits, key=jax.random.fold_in(key, k)),
      )
      for i, new in enumerate(drawn):
        # What is decided has been decoded with the others: it ran.
        ledger = samples[i].ledger + new.ledger
        if i not in opened:
          samples[i] = dataclasses.replace(samples[i], ledger=ledger)
          continue
        paths = [
          dataclasses.replace(path, root=k * self.round + path.root)
          for path in new.paths
        ]
        samples[i] = Samples((*samples[i].paths, *paths), ledger)
    return samples

  def _decided(self, samples: Samples) -> bool:
    return lead(answers_of(samples.paths, self.answer)) >= self.confidence
