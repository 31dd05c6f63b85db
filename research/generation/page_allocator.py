"""Who owns which page: counts on the host, outside of any program.

Rows take pages for all the tokens that they may come to have, and give them
back. Prompts that begin alike share the pages of what they have in common: a
page counts its holders. The page in which they part is copied, for a row that
was admitted is about to write behind what it shares.

What was read into a page is known by the page before it and its own tokens, so
a prefix is found page by page, as in a trie.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from research.typing import UserError

NO_PAGE = -1
"""In the table where a row has no page; also the page before the first."""


@dataclasses.dataclass(frozen=True)
class Admission:
  """What a row that was let in starts with.

  Attributes:
    read: tokens of its prompt that its pages hold already, but not the last.
    copy: the page to copy before anything is written, and to where; or None.
  """

  read: int
  copy: tuple[int, int] | None = None


class PageAllocator:
  """Pages of a pool and the rows that hold them.

  Attributes:
    count, size: pages there are, and tokens of each.
    table: int32 `[rows, W]`, each row's pages.
    most_used: how many pages were held at most.
  """

  def __init__(self, count: int, size: int, rows: int, width: int):
    """All pages are free.

    Args:
      count, size: of the pages.
      rows: how many there are at a time.
      width: pages that a row may have.

    Raises:
      UserError: one of them is below 1.
    """
    given = {"count": count, "size": size, "rows": rows, "width": width}
    for name, value in given.items():
      if value < 1:
        raise UserError(f"pages {name}: found {value}, expected at least 1")
    self.count, self.size, self.most_used = count, size, 0
    self.table = np.full((rows, width), NO_PAGE, np.int32)
    self._free = list(range(count))[::-1]
    self._holders = [0] * count
    self._held: dict[int, tuple[int, tuple[int, ...]]] = {}
    self._behind: dict[int, list[int]] = {}

  @property
  def free(self) -> int:
    """How many pages nobody holds."""
    return len(self._free)

  @property
  def used(self) -> int:
    """How many pages somebody holds."""
    return self.count - self.free

  def pages(self, tokens: int) -> int:
    """Returns how many pages so many tokens of a row take."""
    return -(-tokens // self.size)

  def check(self, tokens: int) -> None:
    """Raises UserError if a row of so many tokens could never be let in."""
    wanted, room = self.pages(tokens), min(self.count, self.table.shape[1])
    if wanted > room:
      raise UserError(
        f"pages: found {room} for a row of {tokens} tokens, expected {wanted} "
        f"of {self.size}.\nGive more pages (count), or ask for fewer tokens."
      )

  def pages_needed(self, prompt: Sequence[int], tokens: int) -> int:
    """Returns how many free pages a row would take.

    Args:
      prompt: its first tokens.
      tokens: how many it may come to have.
    """
    return self._unshared(tokens, self._known(prompt)[0])

  def _unshared(self, tokens: int, shared: Sequence[int]) -> int:
    return self.pages(tokens) - len(shared)

  def has_room(self, prompt: Sequence[int], tokens: int) -> bool:
    """Returns whether a row can be let in now; arguments as for `pages_needed`."""
    return self.pages_needed(prompt, tokens) <= self.free

  def admit(self, row: int, prompt: Sequence[int], tokens: int) -> Admission:
    """Gives pages to a row that has none, and returns what they hold.

    The prompt is taken as written to them: what else is admitted may share
    them at once.

    Args:
      row: of the table.
      prompt: its first tokens, at least one.
      tokens: how many it may come to have, the prompt included.

    Raises:
      UserError: there are not so many free pages.
    """
    if np.any(self.table[row] != NO_PAGE):
      raise UserError(f"pages: row {row} has some, expected them released")
    self.check(tokens)
    shared, part, length = self._known(prompt)
    wanted = self._unshared(tokens, shared)
    if wanted > self.free:
      raise UserError(
        f"pages: found {self.free} of {self.count} free, expected {wanted} for "
        f"a row of {tokens} tokens in pages of {self.size}, {len(shared)} of "
        "them shared.\nGive more pages (count), or wait until rows end."
      )
    own = [self._free.pop() for _ in range(wanted)]
    pages = shared + own
    for page in pages:
      self._holders[page] += 1
    self.table[row, : len(pages)] = pages
    self.most_used = max(self.most_used, self.used)
    self._remember(pages, len(shared), prompt)
    read = len(shared) * self.size + length
    return Admission(read, None if part is None else (part, own[0]))

  def release(self, row: int) -> None:
    """Takes a row's pages back; what others share stays theirs."""
    self._drop(row, self.table.shape[1])

  def trim(self, row: int, position: int) -> None:
    """Takes back pages of a row that end at or before a position.

    For layers that look back on a window alone.
    """
    self._drop(row, max(position, 0) // self.size)

  def _drop(self, row: int, count: int) -> None:
    for page in self.table[row, :count].tolist():
      if page != NO_PAGE:
        self._holders[page] -= 1
        if not self._holders[page]:
          self._forget(page)
          self._free.append(page)
    self.table[row, :count] = NO_PAGE

  def _known(self, prompt: Sequence[int]) -> tuple[list[int], int | None, int]:
    """Returns the pages that begin alike, one that does in part, and how far.

    The last token is never among them: what follows it has to be computed.
    """
    pages, before, end = [], NO_PAGE, len(prompt) - 1
    while True:
      rest = tuple(prompt[len(pages) * self.size : end][: self.size])
      found, length = None, 0
      for page in self._behind.get(before, ()):
        alike = _alike(self._held[page][1], rest)
        if alike > length:
          found, length = page, alike
      if length < self.size:
        return pages, found, length
      pages.append(found)
      before = found

  def _remember(
    self, pages: list[int], first: int, prompt: Sequence[int]
  ) -> None:
    """Notes what is read into pages from the first that is a row's own on."""
    for j in range(first, self.pages(len(prompt))):
      before = pages[j - 1] if j else NO_PAGE
      tokens = tuple(prompt[j * self.size : (j + 1) * self.size])
      self._held[pages[j]] = before, tokens
      self._behind.setdefault(before, []).append(pages[j])

  def _forget(self, page: int) -> None:
    before, _ = self._held.pop(page, (NO_PAGE, ()))
    # The page before may have been another row's since.
    if page in self._behind.get(before, ()):
      self._behind[before].remove(page)
    self._behind.pop(page, None)


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns how many tokens two texts begin alike with."""
  pairs = enumerate(zip(a, b, strict=False))
  most = min(len(a), len(b))
  return next((i for i, (x, y) in pairs if x != y), most)
