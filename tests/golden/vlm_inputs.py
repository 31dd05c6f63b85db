"""What the tiny vision language models read: random images, and rows of tokens.

NumPy alone, so that no peer is needed to draw them again.
"""

from collections.abc import Sequence

import numpy as np

IMAGES_OF = ((0, 1), (2,))
"""Of each of `rows`."""


def images(
  shapes: Sequence[tuple[int, int]], seed: int = 3
) -> list[np.ndarray]:
  """Returns images of (height, width) from one generator, uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def rows(
  image_tokens: Sequence[list[int]], end: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens [2, T] and lengths: words before, between and after images.

  Args:
    image_tokens: all tokens of each of three images, two of row 0 and one of
      row 1.
    end: words are tokens from 3, and below it.
  """
  rng = np.random.default_rng(5)

  def words(n):
    return rng.integers(3, end, n).tolist()

  first = [*words(2), *image_tokens[0], *words(3), *image_tokens[1], *words(2)]
  second = [*image_tokens[2], *words(4)]
  lengths = np.array([len(first), len(second)])
  tokens = np.zeros((2, lengths.max()), np.int64)
  tokens[0, : lengths[0]] = first
  tokens[1, : lengths[1]] = second
  return tokens, lengths
