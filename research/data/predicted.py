"""How much text a loss is about: bits per byte, whatever the tokenizer.

A perplexity is per token and says nothing across vocabularies; bits per byte
do, and compare with compressors (`research.data.baselines`).
"""

import math
from typing import Any, NamedTuple

from research.data.examples import Tokens
from research.data.pipeline import Pipeline


class Predicted(NamedTuple):
  """What the targets of some documents amount to.

  Attributes:
    tokens: how many are predicted, marks of beginning and end included.
    size: bytes of UTF-8 that those of text stand for.
  """

  tokens: int
  size: int


def count_predicted(data: Any, tokenizer: Any) -> Predicted | None:
  """Returns what is predicted of `data`'s documents; None if not of text.

  Every token is predicted but a document's first one; where that is a special
  token all bytes are, and else those of the first token are left out.
  """
  if not isinstance(data, Pipeline) or isinstance(data.source, Tokens):
    return None
  special = data.special_tokens(tokenizer)
  tokens = size = 0
  for text in (data.source[i] for i in range(len(data.source))):
    ids = tokenizer.encode(text)
    whole = len(special.document(ids))
    if whole < 2:
      continue  # nothing to predict: packing leaves it out too
    tokens += whole - 1
    if not special.begin:
      text = tokenizer.decode(ids[1:], skip_special=False)
    size += len(text.encode("utf-8"))
  return Predicted(tokens, size)


def bits_per_byte(
  nll: float, tokens: float | int, of: Predicted | None
) -> float | None:
  """Returns `nll * tokens / (ln 2 * bytes)`.

  Args:
    nll: mean negative log-likelihood of a token, in nats.
    tokens: over how many it was taken.
    of: what they are; None if they are not text.

  Returns:
    None where the mean was not over all of `of`, whose bytes alone are known.
  """
  if of is None or not of.size or tokens != of.tokens:
    return None
  return nll * of.tokens / (math.log(2) * of.size)
