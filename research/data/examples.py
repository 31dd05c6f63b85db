"""Training examples: tokens with a loss mask.

The loss mask is made together with the tokens; no later stage searches for
strings to find out. The loss covers all of a plain text, and the assistant's
messages of a conversation (`research.data.rendering`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.data import packing
from research.data.sources import Documents, NoExamples
from research.text import special_tokens
from research.text.special_tokens import SpecialTokens
from research.typing import UserError


class Example(NamedTuple):
  """Tokens, int32 [n], and whether the loss covers each of them, bool [n]."""

  tokens: np.ndarray
  loss_mask: np.ndarray


@runtime_checkable
class Tokens(Protocol):
  """A source of tokenised examples: conversations, arrays, synthetic data."""

  def examples(self, tokenizer: Any) -> Sequence[Example]: ...


Source = Documents | Tokens


def join(parts: Sequence[tuple[Sequence[int], bool]]) -> Example:
  """Concatenates (ids, in the loss) parts to an example."""
  ids = [i for part, _ in parts for i in part]
  mask = [flag for part, flag in parts for _ in part]
  return Example(np.asarray(ids, np.int32), np.asarray(mask, bool))


def read(
  source: Source,
  tokenizer: Any,
  special: SpecialTokens | None = None,
) -> Sequence[Example]:
  """Returns the examples of a source.

  Args:
    source: documents, or a source of tokenised examples.
    tokenizer: has `encode(text)`; may be None if the source is not text.
    special: special tokens around each text document; None for the tokenizer's
      default.

  Raises:
    NoExamples: no token can be predicted.
    UserError: the source is text and there is no tokenizer.
  """
  if isinstance(source, Tokens):
    found = source.examples(tokenizer)
    if not any(e.loss_mask[1:].any() for e in found):
      raise NoExamples(
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
