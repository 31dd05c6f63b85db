"""Special tokens around documents: `bos` before, `eos` after, or none.

The tokenizer specifies what its model was trained with: `tokenizer.json` by its
post-processor, `tokenizer_config.json` and GGUF files by `add_bos_token` and
`add_eos_token`. A model that was always trained with an initial `bos` needs it
in every row and window, even those that start within a text: it is an attention
sink, and without it the first tokens take that role (Xiao et al. 2023,
arXiv:2309.17453).
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from research.errors import UserError

FILE = "special_tokens.json"
"""File in a run's working directory that records its special tokens."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Token ids around a document.

  Attributes:
    begin: before the document, usually `bos`.
    end: after the document, `eos` or nothing.
    every_row: whether rows and windows that start within a document begin with
      `begin`, too.
  """

  begin: tuple[int, ...] = ()
  end: tuple[int, ...] = ()
  every_row: bool = False

  @property
  def row_begin(self) -> tuple[int, ...]:
    """Initial tokens of a row that starts within a document."""
    return self.begin if self.every_row else ()

  def document(self, ids: Sequence[int]) -> list[int]:
    """Adds special tokens to a document, unless its text has them already."""
    ids = self.prompt(ids)
    written = self.end and tuple(ids[-len(self.end) :]) == self.end
    return ids if written else [*ids, *self.end]

  def prompt(self, ids: Sequence[int]) -> list[int]:
    """Adds the initial special tokens to a text to be continued."""
    return list(ids) if begins_with(ids, self.begin) else [*self.begin, *ids]

  def truncate(self, ids: Sequence[int], room: int) -> list[int]:
    """Returns the last `room` tokens, keeping `row_begin` in front."""
    if len(ids) <= room or not begins_with(ids, self.row_begin):
      return list(ids[-room:])
    kept = room - len(self.row_begin)
    return (
      [*self.row_begin, *ids[len(ids) - kept :]] if kept > 0 else ids[-room:]
    )

  def windows(self, ids: Sequence[int], size: int) -> list[list[int]]:
    """Splits ids into full windows that each begin with `row_begin`.

    Args:
      ids: concatenated documents.
      size: tokens per window, including `row_begin`.
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
    """Returns a JSON object for `read`."""
    return {
      "begin": list(self.begin),
      "end": list(self.end),
      "every_row": self.every_row,
    }


NO_SPECIAL_TOKENS = SpecialTokens()


def begins_with(ids: Any, begin: Sequence[int]) -> bool:
  """Whether `ids`, a list or an array, starts with `begin`."""
  return [int(i) for i in ids[: len(begin)]] == list(begin)


def from_tokenizer(tokenizer: Any) -> SpecialTokens:
  """Returns the special tokens of a tokenizer.

  Args:
    tokenizer: a `Tokenizer`. Any other object with `encode(text)`, or None, has
      no special tokens.
  """
  return getattr(tokenizer, "special", NO_SPECIAL_TOKENS)


def read(path: Any) -> SpecialTokens:
  """Reads the special tokens that `SpecialTokens.record` described.

  Args:
    path: a `pathlib.Path`, or a path of an object store.

  Raises:
    UserError: the file is malformed.
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
      f"{path}: is not a record of a run's special tokens ({error}).\n"
      'Expected {"begin": [ids], "end": [ids], "every_row": true or false}.'
    ) from error
  return SpecialTokens(begin, end, every_row)
