"""`a + b =`, answered by the sum: a task with an exact judge."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from research.data.sources import Split
from research.ranges import AtLeast, Ranged
from research.training.alignment.rewarded_task import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Additions(Ranged):
  """Sums of two numbers below n, each number one token.

  Ids 0 to 2n - 2 are numbers, the three after them `+`, `=` and the end.

  Attributes:
    numbers: n.
    split: "train" or "heldout"; of all n^2 pairs every `every`-th is held out.
    every: see `split`.
  """

  numbers: AtLeast(2) = 10
  split: Split = "train"
  every: AtLeast(2) = 7

  @property
  def plus(self) -> int:
    """The id of `+`; that of `=` follows."""
    return 2 * self.numbers - 1

  @property
  def end(self) -> int:
    return self.plus + 2

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    return (self.end,)

  @property
  def vocab(self) -> int:
    return self.end + 1

  def sample(self, rng: np.random.Generator, count: int) -> list[Prompt]:
    """Returns prompts of the split, drawn with replacement."""
    pairs = np.arange(self.numbers**2)
    # Not by the remainder alone: a column of the table would be missing.
    held = (pairs * 31 + pairs // self.numbers) % self.every == 0
    pairs = pairs[held == (self.split == "heldout")]
    chosen = rng.choice(pairs, count)
    return [self.prompt(*divmod(int(i), self.numbers)) for i in chosen]

  def prompt(self, a: int, b: int) -> Prompt:
    return Prompt((a, self.plus, b, self.plus + 1), (a, b))

  def reward(self, prompt: Prompt, answer: Sequence[int]) -> float:
    return float(list(answer) == [sum(prompt.problem), self.end])
