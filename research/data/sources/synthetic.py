"""Sources whose best possible loss is known, as token ids.

An experiment on them can be judged in absolute terms: `optimal_loss` is the
mean loss in nats, over the tokens that count, of the best predictor there is.
They need no tokenizer; `train`, `validation` and `heldout` are drawn from the
same distribution with different random numbers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.examples import Example
from research.data.sources import Split
from research.typing import Float, UserError

_SPLITS = ("train", "validation", "heldout")


def rng_of(seed: int, split: Split, *more: int) -> np.random.Generator:
  """Returns the generator of a split's documents."""
  return np.random.default_rng([seed, _SPLITS.index(split), *more])


def _check(source: Any, **least: int) -> None:
  for name, low in least.items():
    if getattr(source, name) < low:
      raise UserError(
        f"{type(source).__name__}.{name}: found {getattr(source, name)},"
        f" expected at least {low}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov:
  """A chain of order 1, begun in its stationary distribution.

  Each state's row of the transition matrix is drawn from a symmetric Dirichlet
  distribution; the matrix depends on `seed` alone, not on the split. The best
  loss is the entropy rate, H = sum_i pi_i H(P_i) (Shannon 1948, theorem 5).

  Attributes:
    vocab: states, V.
    length: tokens in a document.
    count: documents.
    concentration: of the Dirichlet distribution; the smaller, the less random.
    seed: of the matrix and of the documents.
    split: which documents.
  """

  vocab: int = 32
  length: int = 256
  count: int = 1024
  concentration: float | int = 0.3
  seed: int = 0
  split: Split = "train"

  def __post_init__(self):
    _check(self, vocab=2, length=2, count=1)
    if not 1e-3 <= self.concentration <= 1e6:
      raise UserError(
        f"Markov.concentration: found {self.concentration}, expected 0.001 to"
        " 1,000,000."
      )

  @property
  def transitions(self) -> Float[np.ndarray, "V V"]:
    """p(next | state), row by state."""
    return _transitions(self.vocab, self.concentration, self.seed)

  @property
  def stationary(self) -> Float[np.ndarray, "V"]:
    """The distribution that the chain keeps."""
    return _stationary(self.transitions)

  @property
  def optimal_loss(self) -> float:
    """The entropy rate, nats a token."""
    p = self.transitions
    surprise = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return float(self.stationary @ surprise.sum(-1))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents; every token counts."""
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
  # A touch of the uniform keeps every state reachable, so that the stationary
  # distribution is unique, and every surprise finite.
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
class Copy:
  """Random symbols, a separator (id V), and the same symbols again.

  Only the second half counts; who attends to the first needs no bit for it.

  Attributes:
    vocab: symbols, V; ids go up to V.
    length: symbols to copy.
    count: documents.
    seed: of the documents.
    split: which documents.
  """

  vocab: int = 32
  length: int = 24
  count: int = 1024
  seed: int = 0
  split: Split = "train"

  def __post_init__(self):
    _check(self, vocab=2, length=1, count=1)

  @property
  def optimal_loss(self) -> float:
    """Nats a token that counts."""
    return 0.0

  @property
  def chance_loss(self) -> float:
    """Of a predictor that does not look back, nats a token."""
    return float(np.log(self.vocab))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents, of 2 length + 1 tokens."""
    shape = (self.count, self.length)
    symbols = rng_of(self.seed, self.split).integers(0, self.vocab, shape)
    between = np.full((self.count, 1), self.vocab)
    tokens = np.concatenate([symbols, between, symbols], 1).astype(np.int32)
    learned = np.arange(tokens.shape[1]) > self.length
    return [Example(row, learned) for row in tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Associative recall: pairs of key and value, then keys to answer.

  Multi-query recall as in Arora et al. 2023 (arXiv:2312.04927), section 3:
  `k v k v ... | k v k v ...`, each key once in either half, the second half
  in another order. Only the second half's values count.

  Attributes:
    keys: different keys, ids 0 .. keys - 1.
    values: different values, the ids that follow.
    pairs: key-value pairs in a document, all of them asked for.
    count: documents.
    seed: of the documents.
    split: which documents.
  """

  keys: int = 32
  values: int = 32
  pairs: int = 8
  count: int = 1024
  seed: int = 0
  split: Split = "train"

  def __post_init__(self):
    _check(self, keys=self.pairs, values=2, pairs=1, count=1)

  @property
  def optimal_loss(self) -> float:
    """Nats a token that counts."""
    return 0.0

  @property
  def chance_loss(self) -> float:
    """Of a predictor that does not look back, nats a token."""
    return float(np.log(self.values))

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the documents, of 4 pairs tokens."""
    learned = np.zeros(4 * self.pairs, bool)
    learned[2 * self.pairs + 1 :: 2] = True
    return [Example(self._document(i), learned) for i in range(self.count)]

  def _document(self, index: int) -> np.ndarray:
    rng = rng_of(self.seed, self.split, index)
    keys = rng.permutation(self.keys)[: self.pairs]
    values = self.keys + rng.integers(0, self.values, self.pairs)
    told = np.stack([keys, values], 1)
    return (
      np.concatenate([told, rng.permutation(told)]).reshape(-1).astype(np.int32)
    )
