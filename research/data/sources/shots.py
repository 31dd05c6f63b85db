"""Pairs of keys and values whose mapping is new in every row: `k v k v ...`.

What a key's value is can be read in the row and nowhere else, so that weights
are of no help: who knows it has learned it in context. Associative recall in
running text, as in Fu et al. 2022 (arXiv:2212.14052), section 3.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from research.data.sources import Split
from research.data.sources.synthetic import rng_of
from research.typing import Bool, Int, UserError

Evidence = Literal["before", "after", "none"]
"""Where pairs with the key stand that is asked for."""

_EVIDENCE = ("before", "after", "none")


class Question(NamedTuple):
  """Rows that each ask for one value, all at the same place.

  Attributes:
    rows: the truth, all of it.
    known: which tokens are told; neither the value nor what comes too late.
    place: of the value.
  """

  rows: Int[np.ndarray, "N T"]
  visible: Bool[np.ndarray, " T"]
  position: int

  def most_common(self) -> Int[np.ndarray, " N"]:
    """Returns the commonest value told: the guess of who knows no keys."""
    told = self.rows[:, 1::2][:, self.visible[1::2]]
    ids = np.unique(told)
    return ids[(told[:, :, None] == ids).sum(1).argmax(1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shots:
  """Rows of pairs, each by a mapping of its own.

  A row has `used` keys, each with a value drawn by lot, so that without
  evidence any value is as likely; every pair has one of them, by lot too.

  Attributes:
    keys: different keys, ids 0 .. keys - 1.
    values: different values, the ids that follow; then the mask.
    used: keys of a row.
    pairs: of a row.
    seed: of the rows.
  """

  keys: int = 16
  values: int = 16
  used: int = 8
  pairs: int = 16
  seed: int = 0

  def __post_init__(self):
    if not 2 <= self.used < self.keys:
      raise UserError(
        f"Shots.used: found {self.used}, expected 2 to {self.keys - 1}, so that"
        " a row leaves a key out"
      )
    if self.values < 2 or self.pairs < 3:
      raise UserError(
        f"Shots: values is {self.values} and pairs {self.pairs}, expected at"
        " least 2 and 3"
      )

  @property
  def mask_id(self) -> int:
    """The token that hides others."""
    return self.keys + self.values

  @property
  def middle(self) -> int:
    """The pair in which a value is asked for with its evidence after it."""
    return (self.pairs - 1) // 2

  def rows(self, split: Split, count: int) -> Int[np.ndarray, "N T"]:
    """Returns so many rows."""
    rng = rng_of(self.seed, split)
    order = rng.integers(0, self.used, (count, self.pairs))
    return self._told(rng, order)

  def questions(
    self, evidence: Evidence, shots: int, split: Split, count: int
  ) -> Question:
    """Returns questions about a pair, with `shots` pairs on one side of it.

    Where there is evidence, one of the `shots` pairs, or more, has the same
    key. Before, or with none, nothing is told behind the question; with
    evidence after it the question is the middle pair's, and all pairs in front
    of it are told, and have other keys.

    Args:
      evidence: where pairs with the same key stand.
      shots: pairs on that side; before the question where there is none.
      split: which rows.
      count: so many.
    """
    pair = self.middle if evidence == "after" else shots
    room = self.pairs - 1 - (pair if evidence == "after" else 0)
    if not 1 <= shots <= room:
      raise UserError(
        f"Shots.questions: found {shots} shots {evidence}, expected 1 to {room} of"
        f" {self.pairs} pairs"
      )
    place = 2 * pair + 1
    rng = rng_of(self.seed, split, shots, _EVIDENCE.index(evidence))
    order = rng.integers(0, self.used, (count, self.pairs))
    line = np.arange(count)
    told = place
    if evidence == "none":
      order[:, pair] = self.used  # the key that the row leaves out
    elif evidence == "before":
      order[:, pair] = order[line, rng.integers(0, pair, count)]
    else:
      others = rng.integers(1, self.used, (count, pair))
      order[:, :pair] = (order[:, pair, None] + others) % self.used
      again = pair + 1 + rng.integers(0, shots, count)
      order[line, again] = order[:, pair]
      told = place + 1 + 2 * shots
    at = np.arange(2 * self.pairs)
    known = (at < told) & (at != place)
    return Question(self._told(rng, order), known, place)

  def _told(self, rng, order) -> Int[np.ndarray, "N T"]:
    """Returns rows of these keys, by number, with mappings by lot."""
    count, own = len(order), self.used + 1
    each = np.tile(np.arange(self.keys), (count, 1))
    keys = rng.permuted(each, axis=1)[:, :own]
    values = self.keys + rng.integers(0, self.values, (count, own))
    both = [np.take_along_axis(x, order, axis=1) for x in (keys, values)]
    return np.stack(both, axis=-1).reshape(count, -1).astype(np.int32)
