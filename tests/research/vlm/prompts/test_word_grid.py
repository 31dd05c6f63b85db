"""Pictures of words, against pictures of one word each."""

import numpy as np
import pytest

from research.typing import UserError
from research.vlm.prompts.word_grid import WordGrid

GRID = WordGrid(columns=3, rows=2, cell=16, capital=8, scatter=3)


def cells(picture, grid=GRID):
  """Returns the picture's cells, row by row, without empty rows or columns."""
  rows, columns, side = grid.rows, grid.columns, grid.cell
  parts = picture[..., 0].reshape(rows, side, columns, side).swapaxes(1, 2)
  return [_cut(x) for x in parts.reshape(-1, side, side)]


def _cut(x):
  ink = x < 255
  return x[np.ix_(ink.any(axis=1), ink.any(axis=0))]


def test_each_word_is_in_a_cell_of_its_own():
  words = ["7", "+", "12", "-", "3"]
  found = cells(GRID(" ".join(words)))
  alone = [cells(GRID(word))[0] for word in words]
  for i, one in enumerate(alone):
    np.testing.assert_array_equal(found[i], one)
    assert all((one.shape != x.shape) or (one != x).any() for x in alone[:i])
  assert found[5].size == 0
  assert GRID("7").shape == (32, 48, 3)


def test_a_text_has_one_picture_and_a_word_many_places():
  texts = [f"7 + {i}" for i in range(8)]
  again = WordGrid(columns=3, rows=2, cell=16, capital=8, scatter=3)
  for text in texts:
    np.testing.assert_array_equal(GRID(text), again(text))
  first = {GRID(text)[:16, :16].tobytes() for text in texts}
  assert len(first) > 4
  fixed = WordGrid(columns=3, rows=2, scatter=0)
  assert len({fixed(text)[:16, :16].tobytes() for text in texts}) == 1


@pytest.mark.parametrize(
  ("text", "words"),
  [("1 + 2 + 3 + 4", "7 words.*at most 6"), ("1234", "'1234' takes")],
)
def test_what_a_grid_has_no_room_for_is_an_error(text, words):
  with pytest.raises(UserError, match=words):
    GRID(text)
