"""Random numbers that PEFT's files leave to torch's generator."""

import numpy as np


def drawn_places(seed: int, total: int, count: int) -> np.ndarray:
  """Returns the first `count` of torch's `randperm(total)` of a seed.

  Its generator on CPU is the Mersenne Twister, seeded as NumPy's legacy one;
  the permutation is Fisher and Yates's, which is final from the front.

  Args:
    seed: of `torch.Generator().manual_seed`.
    total: numbers 0 to total - 1 are permuted.
    count: how many are wanted.
  """
  raw = np.random.RandomState(seed)._bit_generator.random_raw(count)
  moved: dict[int, int] = {}
  out = np.zeros(count, np.int32)
  for i, number in enumerate(raw.tolist()):
    j = i + number % (total - i)
    out[i] = moved.get(j, j)
    moved[j] = moved.get(i, i)
  return out
