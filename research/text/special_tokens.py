"""What stands around a text: `bos` before it, `eos` behind it, or nothing.

A tokenizer says what its model was trained to see there: `tokenizer.json` by
its post-processor, `tokenizer_config.json` and GGUF files by `add_bos_token`
and `add_eos_token`. A model that always saw `bos` first needs it in every row
and window, those that begin within a text too: much of its attention goes
there, and without it the first tokens take its place (Xiao et al. 2023,
arXiv:2309.17453).
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from research.typing import UserError

FILE = "special_tokens.json"
"""In a run's working directory: what its documents began and ended with."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Token ids around a document.

  Attributes:
    begin: before it; `bos` mostly.
    end: behind it; `eos`, if anything.
    every_row: whether rows and windows that begin within a document begin with
      `begin`, too.
  """

  begin: tuple[int, ...] = ()
  end: tuple[int, ...] = ()
  every_row: bool = False

  @property
  def row_begin(self) -> tuple[int, ...]:
    """What a row begins with that begins within a document."""
    return self.begin if self.every_row else ()

  def document(self, ids: Sequence[int]) -> list[int]:
    """Returns a whole document's tokens; none twice that its text spells."""
    ids = self.prompt(ids)
    written = self.end and tuple(ids[-len(self.end) :]) == self.end
    return ids if written else [*ids, *self.end]

  def prompt(self, ids: Sequence[int]) -> list[int]:
    """Returns the tokens of a text that is to be continued."""
    return list(ids) if begins_with(ids, self.begin) else [*self.begin, *ids]

  def truncate(self, ids: Sequence[int], room: int) -> list[int]:
    """Returns the last `room` tokens, of which the first stay `begin`."""
    if len(ids) <= room or not begins_with(ids, self.row_begin):
      return list(ids[-room:])
    kept = room - len(self.row_begin)
    return (
      [*self.row_begin, *ids[len(ids) - kept :]] if kept > 0 else ids[-room:]
    )

  def windows(self, ids: Sequence[int], size: int) -> list[list[int]]:
    """Returns all whole windows of `size` tokens, each with its `row_begin`.

    Args:
      ids: of documents, one behind the other.
      size: tokens of a window, those of `row_begin` included.
    """
    head, start, out = self.row_begin, 0, []
    while True:
      there = begins_with(ids[start : start + len(head)], head)
      own = size if there else size - len(head)
      window = [*head[: size - own], *ids[start : start + own]]
      if own < 1 or len(window) < size:
        return out
      out.append(window)
      start += own

  def record(self) -> dict[str, Any]:
    """Returns what `read` reads, as values of JSON."""
    return {
      "begin": list(self.begin),
      "end": list(self.end),
      "every_row": self.every_row,
    }


NO_SPECIAL_TOKENS = SpecialTokens()


def begins_with(ids: Any, begin: Sequence[int]) -> bool:
  """Whether `ids`, a list or an array, begin with those of `begin`."""
  return [int(i) for i in ids[: len(begin)]] == list(begin)


def from_tokenizer(tokenizer: Any) -> SpecialTokens:
  """Returns what a tokenizer puts around a text.

  Args:
    tokenizer: a `Tokenizer`; anything else that has `encode(text)`, or None,
      puts nothing there.
  """
  return getattr(tokenizer, "special", NO_SPECIAL_TOKENS)


def read(path: Any) -> SpecialTokens:
  """Returns what `SpecialTokens.record` said.

  Args:
    path: a `pathlib.Path`, or one of a bucket.

  Raises:
    UserError: the file holds something else.
  """
  try:
    found = json.loads(path.read_text("utf-8"))
    begin, end = (tuple(found[name]) for name in ("begin", "end"))
    every_row = found["every_row"]
    good = all(type(i) is int and i >= 0 for i in (*begin, *end))
    if not good or type(every_row) is not bool:
      raise ValueError("not ids and a bool")
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(
      f"{path}: is no record of a run's special tokens ({error}).\n"
      'Expected {"begin": [ids], "end": [ids], "every_row": true or false}.'
    ) from error
  return SpecialTokens(begin, end, every_row)
