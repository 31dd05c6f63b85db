"""The ids of a prompt: its texts, what stands for images, special tokens.

Rows, evaluation and the command line make their prompts here, so that a model
is asked as it was trained.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from research.errors import UserError
from research.text import special_tokens
from research.text.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from research.vlm.images.prompts import (
  Piece,
  PromptFormat,
  Soft,
  Text,
  Token,
)


def joined_ids(
  texts: Sequence[str],
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  form: PromptFormat,
) -> list[int]:
  """Returns the ids of a prompt: text, image, text, ..., text.

  Args:
    texts: before each image, and after the last one.
    form: where the tokens stand that begin documents (`place_begin`), and what
      ends the prompt.

  Raises:
    UserError: the tokenizer reads a placeholder in a text.
  """
  *before, last = texts
  images, special = place_begin(images, tokenizer, form)
  texts = [*before, last + form.end]
  return special.prompt(interleaved_ids(texts, images, tokenizer, image_token))


def place_begin(
  images: Sequence[tuple[Piece, ...]], tokenizer: Any, form: PromptFormat
) -> tuple[list[tuple[Piece, ...]], SpecialTokens]:
  """Decides where the tokens stand that begin a prompt's document.

  Returns:
    What stands for each image, those tokens behind the last one if the format
    has them there, also where the text has some (as `PaliGemmaProcessor` does);
    and the special tokens around the prompt, which are none then.
  """
  special = _special_of(tokenizer, form)
  if form.begin != "after_images" or not images:
    return list(images), special
  begin = (Token(tokenizer.backend.id_to_token(i)) for i in special.begin)
  return [*images[:-1], (*images[-1], *begin)], NO_SPECIAL_TOKENS


def _special_of(tokenizer: Any, form: PromptFormat) -> SpecialTokens:
  found = special_tokens.from_tokenizer(tokenizer)
  if form.begin == "first" or found.begin:
    return found
  names = ("bos", "eos") if form.begin == "always" else ("bos",)
  ids = (getattr(tokenizer, name, None) for name in names)
  begin = next((i for i in ids if i is not None), None)
  return found if begin is None else dataclasses.replace(found, begin=(begin,))


def text_ids(
  text: str, tokenizer: Any, image_token: int, before: Sequence[int]
) -> list[int]:
  """Returns the ids of a text, of which none stands for a feature.

  Args:
    before: ids that it follows.

  Raises:
    UserError: it has a placeholder, which would take another one's feature.
  """
  ids = tokenizer.encode_after(before, text)
  if image_token in ids:
    raise UserError(
      f"text: found the image placeholder in {text[:80]!r}, expected text"
      " without it: placeholders are inserted for each image. Remove it"
    )
  return ids


def typed_ids(
  text: str, tokenizer: Any, image_token: int, before: Sequence[int]
) -> list[int]:
  """Returns the ids of a text, in which a placeholder is text as well.

  The tokenizer gets the placeholder's first character apart from the others.

  Raises:
    UserError: the tokenizer reads a placeholder nevertheless.
  """
  ids = tokenizer.encode_after(before, text)
  if image_token not in ids:
    return ids
  name = tokenizer.backend.id_to_token(image_token)
  cuts = [i + 1 for i in range(len(text)) if text.startswith(name, i)]
  ids = []
  for start, end in itertools.pairwise([0, *cuts, len(text)]):
    part = text[start:end]
    ids += text_ids(part, tokenizer, image_token, ids or before)
  return ids


ReadText = Callable[[str, Any, int, Sequence[int]], list[int]]
"""`text_ids`, `typed_ids`."""


def interleaved_ids(
  texts: Sequence[str],
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  before: Sequence[int] = (),
  read: ReadText = text_ids,
) -> list[int]:
  """Returns the ids of texts with an image between each two.

  Newlines around an image may be a token with those of the text next to it, and
  are in Gemma's vocabulary.

  Raises:
    UserError: as for `joined_ids`.
  """
  *first, last = texts
  parts: list[str | int] = []
  for text, pieces in zip(first, images, strict=True):
    parts += [text, *_parts(pieces, tokenizer, image_token)]
  ids = list(before)
  for kind, run in itertools.groupby([*parts, last], type):
    if kind is int:
      ids += run
    elif text := "".join(run):
      ids += read(text, tokenizer, image_token, ids)
  return ids[len(before) :]


def _parts(
  pieces: Sequence[Piece], tokenizer: Any, image_token: int
) -> list[str | int]:
  """Returns what stands for an image: texts, and ids of other pieces.

  Raises:
    UserError: the tokenizer has no such token.
  """
  parts: list[str | int] = []
  for piece in pieces:
    if isinstance(piece, Soft):
      parts += [image_token] * piece.count
    elif isinstance(piece, Text):
      parts.append(piece.text)
    elif piece.text.isspace():
      # As many tokens as the tokenizer makes of it and the text around it.
      parts.append(piece.text)
    else:
      parts.append(_token(piece.text, tokenizer))
  return parts


def _token(text: str, tokenizer: Any) -> int:
  special = tokenizer.backend.token_to_id(text)
  ids = [special] if special is not None else tokenizer.encode(text)
  if len(ids) != 1:
    raise UserError(
      f"tokenizer: found no token {text!r}, which encloses images;"
      " expected the model's own tokenizer"
    )
  return ids[0]
