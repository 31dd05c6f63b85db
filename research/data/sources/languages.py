"""Synthetic second-order languages, and mixtures of them, for fine-tuning.

A model pretrained on one language and tuned on another that shares a part of it
is a minimal model of fine-tuning: learning, forgetting and the optimal loss are
all measurable.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from research.data.examples import Example
from research.data.sources import Split
from research.data.sources.synthetic import rng_of
from research.ranges import AtLeast, PositiveInt, Ranged
from research.typing import Float, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear(Ranged):
  """Tokens with `p(next | x, y) = softmax(f_1[y] + f_2[x])`, y the last one.

  Each seed in `mix` determines two tables f [V, V] of normal random numbers
  with standard deviation `sharpness`; the language is their weighted sum.

  Attributes:
    vocab: vocabulary size, V.
    length: tokens per document.
    count: number of documents.
    mix: seed of the tables -> weight, e.g. `{0: 0.5, 1: 0.7}`.
    sharpness: larger values give a less random language.
    seed: of the documents.
    split: which documents.
  """

  vocab: AtLeast(2) = 32
  length: AtLeast(3) = 33
  count: PositiveInt = 4096
  mix: Mapping[int, float | int] = dataclasses.field(
    default_factory=lambda: {0: 1.0}
  )
  sharpness: float | int = 2.0
  seed: int = 0
  split: Split = "train"

  def __post_init__(self):
    super().__post_init__()
    if not self.mix:
      raise UserError("LogLinear.mix: is empty, expected {seed: weight}.")

  @property
  def transitions(self) -> Float[np.ndarray, "V V V"]:
    """Transition probabilities p(next | last but one, last)."""
    mix = tuple(sorted(self.mix.items()))
    return _transitions(self.vocab, mix, float(self.sharpness))

  @property
  def stationary(self) -> Float[np.ndarray, "V V"]:
    """The stationary distribution of two consecutive tokens."""
    p, found = self.transitions, np.full([self.vocab] * 2, self.vocab**-2.0)
    # All p are positive, so this converges geometrically from any start.
    for _ in range(1000):
      following = np.einsum("xy,xyz->yz", found, p)
      if np.abs(following - found).sum() < 1e-13:
        break
      found = following
    return found / found.sum()

  @property
  def optimal_loss(self) -> float:
    """The entropy rate, in nats per token."""
    p = self.transitions
    surprise = -np.sum(p * np.log(p), -1)
    return float(np.sum(self.stationary * surprise))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    draws = rng_of(self.seed, self.split).random((self.count, self.length))
    tokens = np.empty((self.count, self.length), np.int32)
    pairs = np.cumsum(self.stationary.reshape(-1))
    first = np.searchsorted(pairs / pairs[-1], draws[:, 0], side="right")
    first = np.minimum(first, self.vocab**2 - 1)
    tokens[:, 0], tokens[:, 1] = np.divmod(first, self.vocab)
    below = np.cumsum(self.transitions, -1)
    for t in range(2, self.length):
      rows = below[tokens[:, t - 2], tokens[:, t - 1]]
      found = np.sum(rows <= draws[:, t, None], -1)
      tokens[:, t] = np.minimum(found, self.vocab - 1)
    return [Example(row, np.ones(self.length, bool)) for row in tokens]


@functools.lru_cache(maxsize=8)
def _transitions(vocab, mix, sharpness):
  scores = np.zeros((vocab, vocab, vocab))
  for seed, weight in mix:
    last, before = np.random.default_rng([seed, vocab]).standard_normal(
      (2, vocab, vocab)
    )
    scores += weight * sharpness * (last[None, :, :] + before[:, None, :])
  return scipy.special.softmax(scores, -1)
