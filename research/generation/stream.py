"""Streaming text generation, for one prompt or many."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from research.generation import generate
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.text.tokenizer import StopStrings, StreamDecoder, Tokenizer
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True)
class Piece:
  """New text of a row.

  Attributes:
    text: complete characters that cannot be part of a stop string.
    tokens: number of tokens consumed, without a stop token.
    reason: finish reason, `"stop"` or `"length"`, once the row has ended, else
      None.
  """

  text: str
  tokens: int
  reason: str | None = None


class _Row:
  """Converts the tokens of one row to text."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
    self._decoder = StreamDecoder(tokenizer)
    self._cut = StopStrings(stop)
    self._ends = frozenset(tokenizer.stop)
    self.ended = False

  def feed(self, tokens: Sequence[int]) -> Piece:
    """Returns the text of new `tokens`; stops at `NO_TOKEN`."""
    text, read = "", 0
    for token in tokens:
      if self.ended or token == generate.NO_TOKEN:
        break
      if token in self._ends:
        return self.finish(text, read, "stop")
      read += 1
      text += self._cut.feed(self._decoder.feed([token]))
      if self._cut.found:
        self.ended = True
        return Piece(text, read, "stop")
    return Piece(text, read)

  def finish(self, text: str = "", read: int = 0, reason: str = "length"):
    """Returns the last piece, with all text that was buffered."""
    self.ended = True
    text += self._cut.feed(self._decoder.flush())
    stopped = self._cut.found
    return Piece(text + self._cut.flush(), read, "stop" if stopped else reason)


def stream(
  model: Transformer,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: PRNGKey | None = None,
  stop: Sequence[str] = (),
  size: int = generate.CHUNK,
  kv: Any = None,
  source: generate.TokenSource | None = None,
) -> Iterator[list[Piece]]:
  """Yields a piece for each prompt, until all have ended.

  Args:
    params: its parameters, preferably from `generate.prepare`.
    tokenizer: its stop tokens end a row and are not part of the text.
    prompts: token ids.
    max_new_tokens: maximum per prompt.
    key: random key of the sampling; seed 0 by default.
    stop: strings that end a row at their first occurrence in its new text.
    size: tokens per piece.
    kv: quantizer of the cache, as for `init_cache`.
    source: see `generate.token_source`.

  Raises:
    UserError: both `kv` and `source` are given.
  """
  source = generate.token_source(kv, source)
  rows = [_Row(tokenizer, stop) for _ in prompts]
  for chunk in source(
    model,
    params,
    prompts,
    max_new_tokens,
    sampling,
    key,
    tokenizer.stop,
    size=size,
  ):
    yield [r.feed(t) for r, t in zip(rows, chunk.tolist(), strict=True)]
    if all(row.ended for row in rows):
      return
  yield [Piece("", 0) if row.ended else row.finish() for row in rows]


def complete(
  model: Transformer,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: PRNGKey | None = None,
  stop: Sequence[str] = (),
) -> list[Piece]:
  """Returns the complete continuation of each prompt.

  Arguments are those of `stream`, but prompts are text.
  """
  ids = [tokenizer.prompt(text) for text in prompts]
  if not ids:
    raise UserError("prompts: found none, expected at least one")
  steps = list(
    stream(model, params, tokenizer, ids, max_new_tokens, sampling, key, stop)
  )
  return [
    Piece(
      "".join(piece.text for piece in row),
      sum(piece.tokens for piece in row),
      next(piece.reason for piece in row if piece.reason),
    )
    for row in zip(*steps, strict=True)
  ]
