"""Synthetic token sources with a known optimal loss: Markov, copy, recall.

Results on them can be judged in absolute terms: `optimal_loss` is the mean loss
of the best possible predictor over the target tokens, in nats. They need no
tokenizer. The splits `train`, `validation` and `heldout` are drawn from the
same distribution with different random seeds.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.examples import Example
from research.data.sources import Split
from research.ranges import AtLeast, PositiveInt, Ranged, Real
from research.typing import Float

_SPLITS = ("train", "validation", "heldout")


def rng_of(seed: int, split: Split, *more: int) -> np.random.Generator:
  """Returns the random generator for the documents of a split."""
  return np.random.default_rng([seed, _SPLITS.index(split), *more])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Ranged):
  """A first-order Markov chain, started in its stationary distribution.

  Each row of the transition matrix is drawn from a symmetric Dirichlet
  distribution; the matrix depends on `seed` only, not on the split. The optimal
  loss is the entropy rate, H = sum_i pi_i H(P_i) (Shannon 1948, theorem 5).

  Attributes:
    vocab: number of states, V.
    length: tokens per document.
    count: number of documents.
    concentration: of the Dirichlet distribution; smaller is less random.
    seed: of the matrix and of the documents.
    split: which documents.
  """

  vocab: AtLeast(2) = 32
  length: AtLeast(2) = 256
  count: PositiveInt = 1024
  concentration: Real(at_least=1e-3, at_most=1_000_000) = 0.3
  seed: int = 0
  split: Split = "train"

  @property
  def transitions(self) -> Float[np.ndarray, "V V"]:
    """The transition matrix p(next | state), one row per state."""
    return _transitions(self.vocab, self.concentration, self.seed)

  @property
  def stationary(self) -> Float[np.ndarray, "V"]:
    """The stationary distribution."""
    return _stationary(self.transitions)

  @property
  def optimal_loss(self) -> float:
    """The entropy rate, in nats per token."""
    p = self.transitions
    surprise = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return float(self.stationary @ surprise.sum(-1))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    uniform = rng_of(self.seed, self.split).random((self.count, self.length))
    tokens = np.empty((self.count, self.length), np.int32)
    tokens[:, 0] = _choose(self.stationary[None], uniform[:, 0])
    for t in range(1, self.length):
      rows = self.transitions[tokens[:, t - 1]]
      tokens[:, t] = _choose(rows, uniform[:, t])
    return [Example(row, np.ones(self.length, bool)) for row in tokens]


@functools.lru_cache(maxsize=8)
def _transitions(vocab, concentration, seed):
  rng = np.random.default_rng([seed, len(_SPLITS)])
  # Mixing in a little uniform noise makes every state reachable, so that the
  # stationary distribution is unique and every log-probability finite.
  drawn = rng.dirichlet(np.full(vocab, float(concentration)), vocab)
  return 0.999 * drawn + 0.001 / vocab


def _stationary(p):
  system = np.vstack([p.T - np.eye(len(p)), np.ones(len(p))])
  found = np.linalg.lstsq(system, np.eye(len(p) + 1)[-1], rcond=None)[0]
  return np.maximum(found, 0) / np.maximum(found, 0).sum()


def _choose(rows, uniform):
  """Returns draws from distributions [B or 1, V], by inversion."""
  below = np.cumsum(rows, -1) <= uniform[:, None]
  return np.minimum(below.sum(-1), rows.shape[-1] - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Ranged):
  """Copy task: random symbols, a separator (id V), and the same symbols again.

  The loss covers the second half only, which is a copy of the first.

  Attributes:
    vocab: number of symbols, V; ids go up to V.
    length: number of symbols to copy.
    count: number of documents.
    seed: of the documents.
    split: which documents.
  """

  vocab: AtLeast(2) = 32
  length: PositiveInt = 24
  count: PositiveInt = 1024
  seed: int = 0
  split: Split = "train"

  @property
  def optimal_loss(self) -> float:
    """The optimal loss, in nats per target token."""
    return 0.0

  @property
  def chance_loss(self) -> float:
    """The loss of a predictor without context, in nats per target token."""
    return float(np.log(self.vocab))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents, of `2 length + 1` tokens each."""
    shape = (self.count, self.length)
    symbols = rng_of(self.seed, self.split).integers(0, self.vocab, shape)
    between = np.full((self.count, 1), self.vocab)
    tokens = np.concatenate([symbols, between, symbols], 1).astype(np.int32)
    loss_mask = np.arange(tokens.shape[1]) > self.length
    return [Example(row, loss_mask) for row in tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Ranged):
  """Associative recall: key-value pairs, then all keys again as queries.

  Multi-query recall as in Arora et al. 2023 (arXiv:2312.04927), section 3:
  `k v k v ... | k v k v ...`, with each key once in each half, the second half
  in another order. The loss covers the values of the second half.

  Attributes:
    keys: number of keys, ids 0 .. keys - 1.
    values: number of values, the ids that follow.
    pairs: key-value pairs in a document, each queried once.
    count: number of documents.
    seed: of the documents.
    split: which documents.
  """

  keys: int = 32
  values: AtLeast(2) = 32
  pairs: PositiveInt = 8
  count: PositiveInt = 1024
  seed: int = 0
  split: Split = "train"

  def __post_init__(self):
    super().__post_init__()
    self.expect("keys", self.pairs)

  @property
  def optimal_loss(self) -> float:
    """The optimal loss, in nats per target token."""
    return 0.0

  @property
  def chance_loss(self) -> float:
    """The loss of a predictor without context, in nats per target token."""
    return float(np.log(self.values))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents, of `4 pairs` tokens each."""
    loss_mask = np.zeros(4 * self.pairs, bool)
    loss_mask[2 * self.pairs + 1 :: 2] = True
    return [Example(self._document(i), loss_mask) for i in range(self.count)]

  def _document(self, index: int) -> np.ndarray:
    rng = rng_of(self.seed, self.split, index)
    keys = rng.permutation(self.keys)[: self.pairs]
    values = self.keys + rng.integers(0, self.values, self.pairs)
    pairs = np.stack([keys, values], 1)
    tokens = np.concatenate([pairs, rng.permutation(pairs)])
    return tokens.reshape(-1).astype(np.int32)
