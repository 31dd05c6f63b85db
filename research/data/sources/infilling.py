"""Toy tasks whose answers may be asked for anywhere in a row.

`Pairs` has facts that are told in one order or both, `Orders` instructions, and
`Sums` answers that follow from each other. `shots.Shots` has in-context recall.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.data.examples import Example
from research.data.sources import Split
from research.data.sources.synthetic import rng_of
from research.ranges import AtLeast, PositiveInt, Ranged
from research.typing import Bool, Int, UserError


class Question(NamedTuple):
  """Rows of which some tokens are asked for, the same places in all.

  Attributes:
    rows: the complete rows.
    visible: places that the model sees.
    scored: places whose tokens it is to say; none of those it sees.
  """

  rows: Int[np.ndarray, "N T"]
  visible: Bool[np.ndarray, " T"]
  scored: Bool[np.ndarray, " T"]


@runtime_checkable
class Asks(Protocol):
  """A task with questions whose answers are known."""

  def questions(self) -> Mapping[str, Question]:
    """Returns held-out questions by name."""
    ...


def _asking(rows: np.ndarray, asked: np.ndarray) -> Question:
  return Question(rows, ~asked, asked)


def _examples(rows: np.ndarray, learned: np.ndarray | bool) -> list[Example]:
  mask = np.broadcast_to(learned, rows.shape[1:])
  return [Example(row, mask) for row in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Ranged):
  """Facts about names: `name IS fact`, of half of them also `fact WAS name`.

  What the other half says is asked in the order of training, by the template
  that was not used for it, and as a gap in front (the reversal curse: Berglund
  et al. 2023, arXiv:2309.12288). Names and facts are all different.

  Attributes:
    count: pairs; the first half is trained in both orders.
    size: tokens of a name, and of a fact.
    words: different tokens, names and facts alike; then IS, WAS, the mask.
    seed: seed that the pairs are drawn with.
  """

  count: AtLeast(2) = 40
  size: int = 2
  words: int = 30
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.words**self.size < 4 * self.count:
      raise UserError(
        f"Pairs: count is {self.count}, expected 2 to a quarter of the"
        f" {self.words**self.size} names"
      )

  def entities(self) -> Int[np.ndarray, "N 2 S"]:
    """Returns names and facts."""
    rng = rng_of(self.seed, "train")
    chosen = rng.permutation(self.words**self.size)[: 2 * self.count]
    place = self.words ** np.arange(self.size)
    tokens = chosen[:, None] // place % self.words
    return tokens.reshape(self.count, 2, self.size).astype(np.int32)

  def sentences(self, word: int, reverse: bool) -> Int[np.ndarray, "N T"]:
    """Returns all pairs in one order around `IS` (0) or `WAS` (1)."""
    first, second = np.moveaxis(self.entities(), 1, 0)[:: -1 if reverse else 1]
    middle = np.full((self.count, 1), self.words + word, np.int32)
    return np.concatenate([first, middle, second], axis=1)

  def examples(self, tokenizer=None) -> list[Example]:
    del tokenizer
    both = self.sentences(1, True)[: self.count // 2]
    return _examples(np.concatenate([self.sentences(0, False), both]), True)

  def questions(self) -> dict[str, Question]:
    """Returns the facts, and four ways to ask for names."""
    half, place = self.count // 2, np.arange(2 * self.size + 1)
    front, end = place < self.size, place > self.size
    told, turned = self.sentences(0, False), self.sentences(1, True)
    return {
      "fact": _asking(told, end),
      "template_trained": _asking(turned[:half], end),
      "template_new": _asking(turned[half:], end),
      "gap": _asking(told[half:], front),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orders(Ranged):
  """`how x x x x | y y y y`: y is x as it is, turned round, or moved by one.

  Attributes:
    symbols: of x and y; then the three words for how, one for nothing, `|`, the
      mask.
    length: of x and y.
    instructed: whether rows say how, and y alone is learned; otherwise they
      have the word for nothing, and are learned whole.
    count: number of rows.
    split: which rows.
    heldout: number of held-out questions.
    seed: seed that the rows are drawn with.
  """

  symbols: AtLeast(2) = 12
  length: AtLeast(2) = 6
  instructed: bool = True
  count: int = 8192
  split: Split = "train"
  heldout: int = 256
  seed: int = 0

  def _rows(
    self, split: Split, count: int, instructed: bool
  ) -> Int[np.ndarray, "N T"]:
    rng = rng_of(self.seed, split)
    x = rng.integers(0, self.symbols, (count, self.length))
    orders = rng.integers(0, 3, (count, 1))
    y = np.choose(orders, [x, x[:, ::-1], np.roll(x, 1, axis=1)])
    word = self.symbols + (orders if instructed else np.full_like(orders, 3))
    between = np.full_like(orders, self.symbols + 4)
    return np.concatenate([word, x, between, y], axis=1).astype(np.int32)

  def _answer(self) -> Bool[np.ndarray, " T"]:
    return np.arange(2 * self.length + 2) > self.length + 1

  def examples(self, tokenizer=None) -> list[Example]:
    del tokenizer
    rows = self._rows(self.split, self.count, self.instructed)
    return _examples(rows, self._answer() | (not self.instructed))

  def questions(self) -> dict[str, Question]:
    rows = self._rows("heldout", self.heldout, True)
    return {"instructions": _asking(rows, self._answer())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(Ranged):
  """Digits, and after each one the sum so far, modulo m: `d a d a d a ..`.

  All sums are certain, and far ones hard to see: each follows from its digit
  and the sum before it, or from the next digit and the sum after it. Which are
  filled first decides.

  Attributes:
    modulus: m; digits are 0 to m - 1, sums the m ids that follow, then the
      mask.
    length: digits, and sums.
    given: every so many sums one is given, the last of them.
    count: number of rows.
    split: which rows.
    heldout: number of held-out questions.
    seed: seed that the rows are drawn with.
  """

  modulus: AtLeast(2) = 3
  length: PositiveInt = 16
  given: PositiveInt = 8
  count: int = 8192
  split: Split = "train"
  heldout: int = 256
  seed: int = 0

  def _rows(self, split: Split, count: int) -> Int[np.ndarray, "N T"]:
    rng = rng_of(self.seed, split)
    digits = rng.integers(0, self.modulus, (count, self.length))
    sums = self.modulus + np.cumsum(digits, axis=1) % self.modulus
    both = np.stack([digits, sums], axis=-1)
    return both.reshape(count, -1).astype(np.int32)

  def examples(self, tokenizer=None) -> list[Example]:
    """Returns the rows; sums are learned."""
    del tokenizer
    learned = np.arange(2 * self.length) % 2 == 1
    return _examples(self._rows(self.split, self.count), learned)

  def questions(self) -> dict[str, Question]:
    """Returns rows without the sums that are not given."""
    place = np.arange(2 * self.length)
    asked = (place % 2 == 1) & (place // 2 % self.given != self.given - 1)
    return {"sums": _asking(self._rows("heldout", self.heldout), asked)}
