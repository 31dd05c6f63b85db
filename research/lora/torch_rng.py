"""Reproduces torch's `randperm` in NumPy, for PEFT files that store a seed."""

import functools

import numpy as np

from research.typing import UserError

_LONG = (2**32 - 1) // 20
"""Length from which torch permutes by another algorithm."""

_PIECE = 1 << 20
"""Random numbers per chunk."""


@functools.lru_cache(maxsize=64)
def randperm_prefix(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the first `count` entries of torch's `randperm(total)` on CPU.

  torch's CPU generator is the Mersenne Twister, seeded as NumPy's legacy one
  (randperm_cpu in aten/src/ATen/native/TensorFactories.cpp). From 214,748,364
  entries on the whole permutation must be drawn, which takes 10 seconds.

  Returns:
    int32 `[count]`, read-only.

  Raises:
    UserError: `total` exceeds int32.
  """
  if total > np.iinfo(np.int32).max:
    raise UserError(
      f"a matrix of {total:,} entries, some of which are drawn; expected at "
      f"most {np.iinfo(np.int32).max:,}"
    )
  draw = _forward_shuffle if total < _LONG else _inside_out
  out = draw(seed, total, count)
  out.flags.writeable = False  # the cache returns the same array to everyone
  return out


def _forward_shuffle(seed: int, total: int, count: int) -> np.ndarray:
  raw = np.random.RandomState(seed)._bit_generator.random_raw(count)
  moved: dict[int, int] = {}
  out = np.zeros(count, np.int32)
  for i, number in enumerate(raw.tolist()):
    j = i + number % (total - i)
    out[i] = moved.get(j, j)
    moved[j] = moved.get(i, i)
  return out


def _inside_out(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the start of an inside-out Fisher-Yates shuffle.

  Step i moves the entry at a random position j <= i to position i and stores i
  at j, so entries beyond `count` never return to the start.
  """
  generator = np.random.RandomState(seed)._bit_generator
  out = np.zeros(count, np.int32)
  for start in range(0, total, _PIECE):
    steps = np.arange(start, min(start + _PIECE, total), dtype=np.uint64)
    raw = generator.random_raw(2 * len(steps)).reshape(-1, 2)
    numbers = raw[:, 0] << np.uint64(32) | raw[:, 1]
    places = (numbers % (steps + np.uint64(1))).astype(np.int64)
    seen = (steps < count) | (places < count)
    both = np.stack([steps.astype(np.int64), places], 1)[seen]
    for i, place in both.tolist():
      if i < count:
        out[i] = out[place]
      if place < count:
        out[place] = i
  return out
