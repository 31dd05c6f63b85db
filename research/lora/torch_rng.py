"""Random numbers that PEFT's files leave to torch's generator."""

import functools

import numpy as np

from research.typing import UserError

_LONG = (2**32 - 1) // 20
"""From so many numbers on torch permutes by another algorithm."""

_PIECE = 1 << 20
"""Numbers that are drawn at a time."""


@functools.lru_cache(maxsize=64)
def drawn_places(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the first `count` of torch's `randperm(total)` of a seed.

  Its generator on CPU is the Mersenne Twister, seeded as NumPy's legacy one
  (randperm_cpu in aten/src/ATen/native/TensorFactories.cpp). Of 214,748,364
  numbers and more all have to be drawn, which takes 10 seconds.

  Args:
    seed: of `torch.Generator().manual_seed`.
    total: numbers 0 to total - 1 are permuted.
    count: how many are wanted.

  Raises:
    UserError: there are more numbers than int32 has.
  """
  if total > np.iinfo(np.int32).max:
    raise UserError(
      f"a matrix of {total:,} entries, some of which are drawn; expected at "
      f"most {np.iinfo(np.int32).max:,}"
    )
  draw = _from_the_front if total < _LONG else _inside_out
  out = draw(seed, total, count)
  out.flags.writeable = False  # every caller gets the same one
  return out


def _from_the_front(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the start of a permutation by Fisher and Yates, final at once."""
  raw = np.random.RandomState(seed)._bit_generator.random_raw(count)
  moved: dict[int, int] = {}
  out = np.zeros(count, np.int32)
  for i, number in enumerate(raw.tolist()):
    j = i + number % (total - i)
    out[i] = moved.get(j, j)
    moved[j] = moved.get(i, i)
  return out


def _inside_out(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the start of a permutation by the inside-out variant.

  Step i puts i where another number is, and that one behind all others. What
  is behind the first `count` never comes back.
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
