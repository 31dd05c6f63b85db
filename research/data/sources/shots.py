"""In-context associative recall: key-value pairs, with a new mapping per row.

Rows are `k v k v ...`. The value of a key can only be read in the row itself,
not stored in the weights, so correct answers show in-context learning.
Associative recall as in Fu et al. 2022 (arXiv:2212.14052), section 3.
"""

import dataclasses
from typing import Literal

import numpy as np

from research.data.examples import Example
from research.data.sources import Split
from research.data.sources.infilling import Question
from research.data.sources.synthetic import rng_of
from research.ranges import AtLeast, Ranged
from research.typing import Int, UserError

Evidence = Literal["before", "after", "none"]
"""Where pairs with the queried key occur, relative to the query."""

_EVIDENCE = ("before", "after", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shots(Ranged):
  """Rows of key-value pairs, each with its own mapping.

  Each of the `used` keys of a row gets a uniformly random value, so without
  evidence all values are equally likely. The key of each pair is random, too.

  Attributes:
    keys: number of keys, ids 0 .. keys - 1.
    values: number of values, the ids that follow; then the mask token.
    used: number of keys in a row.
    pairs: number of pairs in a row.
    count: number of rows of `examples`.
    split: which rows those are.
    shots: pairs before or after the value that `questions` ask for.
    heldout: number of rows of each question.
    seed: of the rows.
  """

  keys: int = 16
  values: AtLeast(2) = 16
  used: int = 8
  pairs: AtLeast(3) = 16
  count: int = 65_536
  split: Split = "train"
  shots: int = 8
  heldout: int = 512
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    self.expect("used", 2, self.keys - 1, why="a row has an unused key")

  @property
  def mask_id(self) -> int:
    """The id of the mask token."""
    return self.keys + self.values

  @property
  def middle(self) -> int:
    """The pair that is queried if the evidence comes after it."""
    return (self.pairs - 1) // 2

  def rows(self, split: Split, count: int) -> Int[np.ndarray, "N T"]:
    """Returns `count` random rows of a split."""
    rng = rng_of(self.seed, split)
    order = rng.integers(0, self.used, (count, self.pairs))
    return self._rows(rng, order)

  def examples(self, tokenizer=None) -> list[Example]:
    del tokenizer
    mask = np.ones(2 * self.pairs, bool)
    return [Example(x, mask) for x in self.rows(self.split, self.count)]

  def questions(self) -> dict[str, Question]:
    """Returns held-out questions by where their evidence stands."""
    return {
      name: self.question(name, self.shots, "heldout", self.heldout)
      for name in _EVIDENCE
    }

  def question(
    self, evidence: Evidence, shots: int, split: Split, count: int
  ) -> Question:
    """Returns queries of a pair's value, with `shots` pairs on one side of it.

    With evidence, at least one of the `shots` pairs has the queried key. With
    evidence "before" or "none", nothing after the query is visible. With
    evidence "after", the query is the middle pair, and all pairs before it are
    visible but have other keys.

    Args:
      evidence: where pairs with the same key occur.
      shots: number of pairs on that side; with "none", before the query.
      split: which rows.
      count: number of rows.

    Raises:
      UserError: the row has too few pairs for `shots`.
    """
    pair = self.middle if evidence == "after" else shots
    room = self.pairs - 1 - (pair if evidence == "after" else 0)
    if not 1 <= shots <= room:
      raise UserError(
        f"Shots.question: found {shots} shots {evidence}, expected 1 to {room}"
        f" of {self.pairs} pairs"
      )
    place = 2 * pair + 1
    rng = rng_of(self.seed, split, shots, _EVIDENCE.index(evidence))
    order = rng.integers(0, self.used, (count, self.pairs))
    line = np.arange(count)
    end = place
    if evidence == "none":
      order[:, pair] = self.used  # the key that the row does not use
    elif evidence == "before":
      order[:, pair] = order[line, rng.integers(0, pair, count)]
    else:
      others = rng.integers(1, self.used, (count, pair))
      order[:, :pair] = (order[:, pair, None] + others) % self.used
      again = pair + 1 + rng.integers(0, shots, count)
      order[line, again] = order[:, pair]
      end = place + 1 + 2 * shots
    at = np.arange(2 * self.pairs)
    known = (at < end) & (at != place)
    return Question(self._rows(rng, order), known, at == place)

  def _rows(self, rng, order) -> Int[np.ndarray, "N T"]:
    """Returns rows with these key indices and a random mapping per row."""
    count, own = len(order), self.used + 1
    each = np.tile(np.arange(self.keys), (count, 1))
    keys = rng.permuted(each, axis=1)[:, :own]
    values = self.keys + rng.integers(0, self.values, (count, own))
    both = [np.take_along_axis(x, order, axis=1) for x in (keys, values)]
    return np.stack(both, axis=-1).reshape(count, -1).astype(np.int32)
