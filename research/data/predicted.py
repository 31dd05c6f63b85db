"""Bits per byte: converts a loss per token to one per byte of text.

Perplexities per token are not comparable across vocabularies. Bits per byte
are, also with compressors (`research.data.baselines`).
"""

import math
from typing import Any, NamedTuple

from research.data.examples import Tokens
from research.data.pipeline import Pipeline


class Predicted(NamedTuple):
  """Number of target tokens and bytes of a set of documents.

  Attributes:
    tokens: number of predicted tokens, including special tokens.
    size: number of UTF-8 bytes of the predicted text.
  """

  tokens: int
  size: int


def count_predicted(data: Any, tokenizer: Any) -> Predicted | None:
  """Counts the predicted tokens and bytes of `data`; None if it is not text.

  Every token of a document but its first is predicted. If the first one is a
  special token, all bytes are predicted, else all but the first token's.
  """
  if not isinstance(data, Pipeline) or isinstance(data.source, Tokens):
    return None
  special = data.special_tokens(tokenizer)
  tokens = size = 0
  for text in (data.source[i] for i in range(len(data.source))):
    ids = tokenizer.encode(text)
    whole = len(special.document(ids))
    if whole < 2:
      continue  # nothing to predict: packing drops it too
    tokens += whole - 1
    size += len(text.encode("utf-8"))
    if not special.begin:
      # Not the others' text: some decoders drop the blank that begins a text.
      first = tokenizer.decode(ids[:1], skip_special=False)
      size -= len(first.encode("utf-8"))
  return Predicted(tokens, size)


def bits_per_byte(
  nll: float, tokens: float | int, of: Predicted | None
) -> float | None:
  """Returns `nll * tokens / (ln 2 * bytes)`.

  Args:
    nll: mean negative log-likelihood per token, in nats.
    tokens: number of tokens in that mean.
    of: token and byte counts of the documents; None if they are not text.

  Returns:
    Bits per byte. None if `of` is None or the mean covers only a part of its
    tokens, since their number of bytes is unknown.
  """
  if of is None or not of.size or tokens != of.tokens:
    return None
  return nll * of.tokens / (math.log(2) * of.size)
