"""Tasks of the studies of masked diffusion, and models that have learned them.

Answers can be checked: a `synthetic.Markov` chain says how likely a row is, a
`Sums` what is right.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.studies.diffusion.study import Tiny
from experiments.studies.documents import documents
from research.data.batches import batch_of
from research.data.sources import Split
from research.data.sources.synthetic import Markov, rng_of
from research.diffusion.batch_transforms import BatchTransform
from research.diffusion.objective import MaskedDiffusion, Noise
from research.diffusion.schedule import Linear
from research.nn.transformer import Transformer
from research.typing import Bool, Int, Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
  """Digits, and after each one the sum so far, modulo m: `d a d a d a ..`.

  All sums are certain, and far ones hard to see: each follows from its digit
  and the sum before it, or from the next digit and the sum after it. Which are
  filled first decides.

  Attributes:
    modulus: m; digits are 0 to m - 1, sums the m ids that follow.
    length: digits, and sums.
    given: every so many sums one is given, the last of them.
    seed: of the documents.
  """

  modulus: int = 3
  length: int = 16
  given: int = 8
  seed: int = 0

  def __post_init__(self):
    if self.modulus < 2 or self.length < 1 or self.given < 1:
      raise UserError(
        f"Sums: modulus is {self.modulus}, length {self.length}, given"
        f" {self.given}; expected at least 2, 1 and 1"
      )

  @property
  def mask_id(self) -> int:
    """The token that hides others."""
    return 2 * self.modulus

  def rows(self, split: Split, count: int) -> Int[np.ndarray, "N T"]:
    """Returns so many rows."""
    rng = rng_of(self.seed, split)
    digits = rng.integers(0, self.modulus, (count, self.length))
    sums = self.modulus + np.cumsum(digits, axis=1) % self.modulus
    both = np.stack([digits, sums], axis=-1)
    return both.reshape(count, -1).astype(np.int32)

  def learned(self) -> Bool[np.ndarray, " T"]:
    """Returns where the sums are."""
    return np.arange(2 * self.length) % 2 == 1

  def answer_mask(self) -> Bool[np.ndarray, " T"]:
    """Returns where the sums are that are not given."""
    number = np.arange(2 * self.length) // 2
    return self.learned() & (number % self.given != self.given - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
  """`t d d d d`: digits whose sum is t, more often than by luck.

  Attributes:
    digits: how many there are, from 0 on; targets are the ids that follow, one
      for each sum.
    length: digits of an answer.
    honest: how many of the base's answers are right by intent; the targets of
      the others are drawn apart, all as likely.
    seed: of the documents.
  """

  digits: int = 3
  length: int = 4
  honest: float = 0.3
  seed: int = 0

  def __post_init__(self):
    if self.digits < 2 or self.length < 1 or not 0 <= self.honest <= 1:
      raise UserError(
        f"Targets: digits is {self.digits}, length {self.length}, honest"
        f" {self.honest}; expected at least 2, 1, and 0 to 1"
      )

  @property
  def sums(self) -> int:
    """How many different sums there are."""
    return self.length * (self.digits - 1) + 1

  @property
  def mask_id(self) -> int:
    """The token that hides others."""
    return self.digits + self.sums

  def rows(self, count: int) -> Int[np.ndarray, "N T"]:
    """Returns what the base learns."""
    rng = rng_of(self.seed, "train")
    digits = rng.integers(0, self.digits, (count, self.length))
    targets = rng.integers(0, self.sums, count)
    honest = rng.random(count) < self.honest
    targets = np.where(honest, digits.sum(1), targets)
    prompt = self.digits + targets[:, None]
    return np.concatenate([prompt, digits], axis=1).astype(np.int32)

  def right(self, rows: Int[Any, "N T"]) -> Any:
    """Returns which answers are right, of NumPy's or JAX's arrays."""
    return rows[:, 1:].sum(1) == rows[:, 0] - self.digits

  def agreement(self, rows: Int[np.ndarray, "N T"]) -> float:
    """Returns how often two right answers to one target are the same.

    In multiples of what it were if all right answers were as likely; 1 where
    there are no two.

    Args:
      rows: answers, right or wrong.
    """
    every = np.indices((self.digits,) * self.length).reshape(self.length, -1)
    ways = np.bincount(every.sum(0), minlength=self.sums)
    found, counts = np.unique(
      rows[self.right(rows)], axis=0, return_counts=True
    )
    target = found[:, 0] - self.digits
    total = np.bincount(target, counts, self.sums)
    evenly = (total * (total - 1) / ways).sum()
    same = (counts * (counts - 1)).sum()
    return float(same / evenly) if evenly > 0 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walks:
  """`s g | walk`: from s, by chance, to neighbours on a ring until g; ends.

  How long a walk is is known in distribution only, and each of its steps is one
  of two, while what follows it is certain.

  Attributes:
    nodes: of the ring, at least 4; the end of a text and the mask follow.
    length: of an answer, filled up with ends; longer walks are left out.
    seed: of the documents.
  """

  nodes: int = 8
  length: int = 32
  seed: int = 0

  def __post_init__(self):
    if self.nodes < 4 or self.length <= self.nodes:
      raise UserError(
        f"Walks: nodes is {self.nodes} and length {self.length}, expected at"
        " least 4, and more than nodes"
      )

  @property
  def end(self) -> int:
    """The token that ends a walk."""
    return self.nodes

  @property
  def mask_id(self) -> int:
    """The token that hides others."""
    return self.nodes + 1

  def rows(self, split: Split, count: int) -> Int[np.ndarray, "N T"]:
    """Returns so many rows, `2 + length` tokens each."""
    rng = rng_of(self.seed, split)
    out: list[np.ndarray] = []
    while sum(map(len, out)) < count:
      start = rng.integers(0, self.nodes, 256)
      goal = (start + rng.integers(1, self.nodes, 256)) % self.nodes
      turns = rng.choice([-1, 1], (256, self.length))
      walk = (start[:, None] + np.cumsum(turns, axis=1)) % self.nodes
      there = walk == goal[:, None]
      over = np.cumsum(there, axis=1) - there > 0
      walk = np.where(over, self.end, walk)
      made = np.concatenate([start[:, None], goal[:, None], walk], axis=1)
      out.append(made[walk[:, -1] == self.end])
    return np.concatenate(out)[:count].astype(np.int32)

  def lengths(self, rows: Int[np.ndarray, "N T"]) -> Int[np.ndarray, " N"]:
    """Returns the tokens before each row's first end."""
    ends = rows[:, 2:] == self.end
    return np.where(ends.any(1), ends.argmax(1), self.length)

  def valid(self, rows: Int[np.ndarray, "N T"]) -> Bool[np.ndarray, " N"]:
    """Returns which rows walk from start to goal, there first, then end."""
    place, stop = np.arange(self.length), self.lengths(rows)[:, None]
    walk, goal = rows[:, 2:], rows[:, 1:2]
    before = np.concatenate([rows[:, :1], walk[:, :-1]], axis=1)
    step = np.isin((walk - before) % self.nodes, (1, self.nodes - 1))
    good = np.where(place < stop, step, walk == self.end).all(1)
    there = (walk == goal) & (place < stop)
    last = np.take_along_axis(walk, np.maximum(stop - 1, 0), axis=1) == goal
    return good & (there.sum(1) == 1) & last[:, 0]

  def mean_length(self, start: int, goal: int) -> float:
    """Returns the mean length of the walks between two nodes, exactly."""
    now, chances = np.eye(self.nodes)[start], []
    for _ in range(self.length - 1):
      now = 0.5 * (np.roll(now, 1) + np.roll(now, -1))
      chances.append(now[goal])
      now[goal] = 0.0
    p = np.array(chances)
    return float((p * np.arange(1, self.length)).sum() / p.sum())


def learn(
  pool: Any,
  vocab: int,
  tiny: Tiny,
  steps: int,
  seed: int,
  noise: Noise = "all",
  batch_transforms: tuple[BatchTransform, ...] = (),
) -> tuple[Transformer, Params]:
  """Returns a model of rows, by plain masked diffusion; the last id masks.

  Args:
    pool: a batch of all rows.
    vocab: ids, the mask's included.
    tiny: the model.
    steps: of training.
    seed: of weights, order and masks.
    noise, batch_transforms: see `MaskedDiffusion`.
  """
  model, params = tiny.load(vocab, seed)
  objective = MaskedDiffusion(
    model=model,
    mask_id=vocab - 1,
    schedule=Linear(),
    noise=noise,
    spread="even",
    rows=2048,
    batch_transforms=batch_transforms,
  )
  return model, tiny.trained(objective, params, pool, steps, seed)


def learn_chain(source: Markov, tiny: Tiny, steps: int, seed: int):
  """Returns a model of a chain; see `learn`."""
  pool = batch_of(documents(source, "train", source.count))
  return learn(pool, source.vocab + 1, tiny, steps, seed)


def learn_targets(task: Targets, tiny: Tiny, steps: int, seed: int):
  """Returns a model of answers, more of them right than by luck."""
  pool = batch_of(task.rows(8192), np.arange(task.length + 1) > 0)
  return learn(pool, task.mask_id + 1, tiny, steps, seed, "learned")


def learn_sums(task: Sums, tiny: Tiny, steps: int, seed: int):
  """Returns a model of sums, given digits; see `learn`."""
  pool = batch_of(task.rows("train", 8192), task.learned())
  return learn(pool, task.mask_id + 1, tiny, steps, seed, "learned")
