"""Examples: tokens, and which of them a model shall learn to say.

Whether a token counts is decided where the example is made, token by token;
nothing later searches for strings to find out. Text counts throughout, a
conversation in what the assistant says (`research.data.rendering`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.data import packing
from research.data.sources import Documents
from research.text import special_tokens
from research.text.special_tokens import SpecialTokens
from research.typing import UserError


class Example(NamedTuple):
  """Tokens int32 [n], and bool [n]: is this token worth predicting?"""

  tokens: np.ndarray
  loss_mask: np.ndarray


@runtime_checkable
class Tokens(Protocol):
  """A source that makes its own tokens: conversations, arrays, synthetic."""

  def examples(self, tokenizer: Any) -> Sequence[Example]: ...


Source = Documents | Tokens


def join(parts: Sequence[tuple[Sequence[int], bool]]) -> Example:
  """Returns the example that consists of (ids, learned) parts."""
  ids = [i for part, _ in parts for i in part]
  learned = [flag for part, flag in parts for _ in part]
  return Example(np.asarray(ids, np.int32), np.asarray(learned, bool))


def read(
  source: Source,
  tokenizer: Any,
  special: SpecialTokens | None = None,
) -> Sequence[Example]:
  """Returns the examples of a source.

  Args:
    source: documents, or something that makes its own tokens.
    tokenizer: with `encode(text)`; None where no text has to be read.
    special: what each document of text begins and ends with; None for what
      the tokenizer says.

  Raises:
    UserError: text without a tokenizer, or nothing that could be predicted.
  """
  if isinstance(source, Tokens):
    found = source.examples(tokenizer)
    if not any(e.loss_mask[1:].any() for e in found):
      raise UserError(
        f"{str(source)[:200]}: {len(found)} examples, none with a token to"
        " predict.\nExpected at least one; check the source's fields or split."
      )
    return found
  if tokenizer is None:
    raise UserError(
      f"{str(source)[:200]}: is text, and this model has no tokenizer.\n"
      "Use a source of tokens (arrays, synthetic) or a model with a tokenizer."
    )
  if special is None:
    special = special_tokens.from_tokenizer(tokenizer)
  documents = packing.tokenize(source, tokenizer.encode, special)
  return [Example(t, np.ones(len(t), bool)) for t in documents]
