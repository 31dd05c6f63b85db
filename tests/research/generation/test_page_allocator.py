"""The page allocator against a simulated memory."""

import numpy as np
import pytest

from research.generation.page_allocator import NO_PAGE, PageAllocator
from research.typing import UserError

COUNT, SIZE, ROWS, WIDTH = 14, 4, 4, 6


class Memory:
  """Pages with their tokens, and the tokens that each row expects."""

  def __init__(self):
    self.pages = PageAllocator(COUNT, SIZE, ROWS, WIDTH)
    self.slots = np.full((COUNT, SIZE), -1)
    self.prompts, self.texts, self.room = {}, {}, {}

  def admit(self, row, prompt, tokens):
    start = self.pages.admit(row, prompt, tokens)
    if start.copy is not None:
      self.slots[start.copy[1]] = self.slots[start.copy[0]]
    self.texts[row] = prompt[: start.read]
    self.prompts[row], self.room[row] = prompt, tokens
    assert self.read(row) == prompt[: start.read]
    for token in prompt[start.read :]:
      self.write(row, token)
    return start

  def write(self, row, token):
    page, slot = divmod(len(self.texts[row]), SIZE)
    page = self.pages.table[row, page]
    # Nobody else has it.
    assert np.sum(self.pages.table == page) == 1 and page != NO_PAGE
    self.slots[page, slot] = token
    self.texts[row].append(token)

  def release(self, row):
    self.pages.release(row)
    del self.prompts[row], self.texts[row], self.room[row]

  def read(self, row):
    found = self.slots[self.pages.table[row]].reshape(-1).tolist()
    return found[: len(self.texts[row])]

  def check(self):
    table = self.pages.table
    for row in range(ROWS):
      wanted = -(-self.room.get(row, 0) // SIZE)
      assert np.all(table[row, :wanted] != NO_PAGE)
      assert np.all(table[row, wanted:] == NO_PAGE)
    held = set(table[table != NO_PAGE].tolist())
    assert held <= set(range(COUNT))
    assert (self.pages.used, self.pages.free) == (len(held), COUNT - len(held))
    for row, text in self.texts.items():
      assert self.read(row) == text


def alike(a, b):
  equal = [x == y for x, y in zip(a, b, strict=False)]
  return equal.index(False) if False in equal else len(equal)


def test_rows_find_what_they_wrote_and_share_all_that_is_alike():
  """Vocabulary of two tokens, so that prompts share many prefixes."""
  seen = np.zeros(3, int)
  for seed in range(30):
    rng, memory = np.random.default_rng(seed), Memory()
    for _ in range(100):
      row = int(rng.integers(ROWS))
      if row not in memory.texts:
        prompt = rng.integers(2, size=rng.integers(1, 15)).tolist()
        seen += tried(memory, row, prompt, len(prompt) + int(rng.integers(9)))
      elif len(memory.texts[row]) < memory.room[row] and rng.random() < 0.7:
        memory.write(row, int(rng.integers(2)))
      else:
        memory.release(row)
      memory.check()
    for row in list(memory.texts):
      memory.release(row)
    memory.check()
    assert memory.pages.used == 0
  assert min(seen) > 50


def tried(memory, row, prompt, tokens):
  """Returns whether pages were shared, copied and refused."""
  if not memory.pages.has_room(prompt, tokens):
    table = memory.pages.table.copy()
    with pytest.raises(UserError, match="free, expected"):
      memory.pages.admit(row, prompt, tokens)
    assert np.array_equal(table, memory.pages.table)
    return [0, 0, 1]
  known = [alike(p, prompt[:-1]) for p in memory.prompts.values()]
  start = memory.admit(row, prompt, tokens)
  assert start.read == max(known, default=0)
  assert (start.copy is None) == (start.read % SIZE == 0)
  return [start.read >= SIZE, start.copy is not None, 0]


def test_a_prefix_is_held_until_the_last_of_its_rows_ends():
  pages = PageAllocator(8, 4, 3, 4)
  first = [1, 2, 3, 4, 5, 6, 7, 8, 9]
  assert pages.admit(0, first, 12).read == 0
  start = pages.admit(1, [*first[:8], 0, 0], 12)
  assert (start.read, start.copy, pages.used) == (8, None, 4)
  assert pages.table[1, :2].tolist() == pages.table[0, :2].tolist()
  pages.release(0)
  assert pages.used == 3
  start = pages.admit(2, first[:7], 8)
  # The page of 5, 6, 7, 8 is copied for 5 and 6: 7 is the last.
  assert (start.read, start.copy[0]) == (6, pages.table[1, 1])
  assert start.copy[1] == pages.table[2, 1] != pages.table[1, 1]
  for row in (1, 2):
    pages.release(row)
  assert (pages.used, pages.most_used) == (0, 4)
  assert pages.admit(0, first, 12).read == 0  # nobody has it any more


def test_what_no_window_reaches_is_given_back():
  pages = PageAllocator(6, 4, 2, 6)
  prompt = list(range(10))
  pages.admit(0, prompt, 20)
  held = pages.table[0].copy()
  pages.trim(0, 3)
  assert pages.used == 5
  pages.trim(0, 11)
  assert pages.table[0].tolist() == [NO_PAGE, NO_PAGE, *held[2:5], NO_PAGE]
  assert pages.used == 3
  # Whose beginning is gone is not found, and its pages are another's.
  start = pages.admit(1, prompt[:9], 12)
  assert start.read == 0 and pages.free == 0
  pages.release(0)
  pages.release(1)
  assert pages.used == 0


def test_mistakes():
  with pytest.raises(UserError, match="pages size: found 0"):
    PageAllocator(4, 0, 1, 1)
  pages = PageAllocator(4, 4, 2, 3)
  with pytest.raises(UserError, match="found 3 for a row of 13.*expected 4"):
    pages.admit(0, [1], 13)
  pages.admit(0, [1], 12)
  with pytest.raises(UserError, match="row 0 has some"):
    pages.admit(0, [1], 4)
  with pytest.raises(UserError, match="found 1 of 4 free, expected 2"):
    pages.admit(1, [2], 5)
