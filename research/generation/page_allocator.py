"""Page allocator with prefix sharing, on the host, by reference counts.

A row gets pages for its maximum number of tokens and releases them at its end.
Prompts with a common prefix share its full pages; each page has a reference
count. The page in which they diverge is copied, because the new row is about to
write behind the shared part.

The content of a page is identified by the previous page and its own tokens, so
a prefix is looked up page by page, as in a trie.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from research.typing import UserError

NO_PAGE = -1
"""Table entry without a page; also the predecessor of the first page."""


@dataclasses.dataclass(frozen=True)
class Admission:
  """The prefix that an admitted row shares.

  Attributes:
    read: number of prompt tokens already in its pages; never the last token.
    copy: (source, target) pages to copy before anything is written, or None.
  """

  read: int
  copy: tuple[int, int] | None = None


class PageAllocator:
  """Assigns the pages of a pool to rows.

  Attributes:
    count, size: number of pages, and tokens per page.
    table: int32 `[rows, W]`, page numbers of each row.
    most_used: peak number of pages in use.
  """

  def __init__(self, count: int, size: int, rows: int, width: int):
    """Creates an allocator with all pages free.

    Args:
      count, size: number of pages, and tokens per page.
      rows: number of rows at a time.
      width: maximum number of pages of a row.

    Raises:
      UserError: one of them is below 1.
    """
    sizes = {"count": count, "size": size, "rows": rows, "width": width}
    for name, value in sizes.items():
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
    """The number of free pages."""
    return len(self._free)

  @property
  def used(self) -> int:
    """The number of pages in use."""
    return self.count - self.free

  def pages(self, tokens: int) -> int:
    """Returns the number of pages for a row of `tokens` tokens."""
    return -(-tokens // self.size)

  def check(self, tokens: int) -> None:
    """Raises UserError if a row of `tokens` tokens can never be admitted."""
    wanted, room = self.pages(tokens), min(self.count, self.table.shape[1])
    if wanted > room:
      raise UserError(
        f"pages: found {room} for a row of {tokens} tokens, expected {wanted} "
        f"of {self.size}.\nGive more pages (count), or ask for fewer tokens."
      )

  def pages_needed(self, prompt: Sequence[int], tokens: int) -> int:
    """Returns the number of free pages needed to admit a row.

    Args:
      prompt: token ids of its prompt.
      tokens: maximum number of its tokens, including the prompt.
    """
    return self._unshared(tokens, self._known(prompt)[0])

  def _unshared(self, tokens: int, shared: Sequence[int]) -> int:
    return self.pages(tokens) - len(shared)

  def has_room(self, prompt: Sequence[int], tokens: int) -> bool:
    """Returns whether a row can be admitted now; see `pages_needed`."""
    return self.pages_needed(prompt, tokens) <= self.free

  def admit(self, row: int, prompt: Sequence[int], tokens: int) -> Admission:
    """Assigns pages to a row that has none.

    The prompt counts as written from now on: rows admitted later may share its
    pages.

    Args:
      row: index in the table.
      prompt: token ids of its prompt, at least one.
      tokens: maximum number of its tokens, including the prompt.

    Returns:
      The prefix that the row shares with earlier prompts.

    Raises:
      UserError: there are too few free pages, or the row has pages already.
    """
    shared, part, length = self._known(prompt)
    assigned = self._assign(row, shared, tokens)
    self._remember(shared + assigned, len(shared), prompt)
    read = len(shared) * self.size + length
    return Admission(read, None if part is None else (part, assigned[0]))

  def _assign(self, row: int, shared: list[int], tokens: int) -> list[int]:
    """Gives shared pages and free ones to a row; returns the latter."""
    if np.any(self.table[row] != NO_PAGE):
      raise UserError(f"pages: row {row} has some, expected them released")
    self.check(tokens)
    needed = self._unshared(tokens, shared)
    if needed > self.free:
      raise UserError(
        f"pages: found {self.free} of {self.count} free, expected {needed} for "
        f"a row of {tokens} tokens in pages of {self.size}, {len(shared)} of "
        "them shared.\nGive more pages (count), or wait until rows end."
      )
    assigned = [self._free.pop() for _ in range(needed)]
    pages = shared + assigned
    for page in pages:
      self._holders[page] += 1
    self.table[row, : len(pages)] = pages
    self.most_used = max(self.most_used, self.used)
    return assigned

  def release(self, row: int) -> None:
    """Releases the pages of a row; pages shared with others stay in use."""
    self._drop(row, self.table.shape[1])

  def trim(self, row: int, position: int) -> None:
    """Releases pages of a row that end at or before a position.

    For models in which all layers have a window.
    """
    self._drop(row, max(position, 0) // self.size)

  def _drop(self, row: int, count: int) -> None:
    for page in self.table[row, :count].tolist():
      if page != NO_PAGE:
        self._leave(page)
    self.table[row, :count] = NO_PAGE

  def _leave(self, page: int) -> None:
    self._holders[page] -= 1
    if not self._holders[page]:
      self._forget(page)
      self._free.append(page)

  def _known(self, prompt: Sequence[int]) -> tuple[list[int], int | None, int]:
    """Finds the longest known prefix of a prompt.

    Returns the fully shared pages, a partially shared one (or None), and the
    number of tokens shared in it. The prompt's last token is never shared: its
    hidden state must be computed.
    """
    pages, before, end = [], NO_PAGE, len(prompt) - 1
    while True:
      rest = tuple(prompt[len(pages) * self.size : end][: self.size])
      best, length = None, 0
      for page in self._behind.get(before, ()):
        alike = _common_prefix(self._held[page][1], rest)
        if alike > length:
          best, length = page, alike
      if length < self.size:
        return pages, best, length
      pages.append(best)
      before = best

  def _remember(
    self, pages: list[int], first: int, prompt: Sequence[int]
  ) -> None:
    """Records the content of pages, from the first unshared one on."""
    for j in range(first, self.pages(len(prompt))):
      before = pages[j - 1] if j else NO_PAGE
      tokens = tuple(prompt[j * self.size : (j + 1) * self.size])
      self._held[pages[j]] = before, tokens
      self._behind.setdefault(before, []).append(pages[j])

  def _forget(self, page: int) -> None:
    before, _ = self._held.pop(page, (NO_PAGE, ()))
    # The previous page may have been reassigned since.
    if page in self._behind.get(before, ()):
      self._behind[before].remove(page)
    self._behind.pop(page, None)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns the length of the common prefix."""
  pairs = enumerate(zip(a, b, strict=False))
  most = min(len(a), len(b))
  return next((i for i, (x, y) in pairs if x != y), most)
