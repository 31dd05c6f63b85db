"""The ids of a prompt: its texts, what stands for images, special tokens.

Rows, evaluation and the command line make their prompts here, so that a model
is asked as it was trained.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from research.errors import UserError
from research.text import special_tokens
from research.vlm.images.prompts import Piece, PromptFormat, Soft, Text


def joined_ids(
  texts: Sequence[str],
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  form: PromptFormat | None,
) -> list[int]:
  """Returns the ids of a prompt: text, image, text, ..., text.

  Args:
    texts: before each image, and after the last one.
    images: what stands for each.
    tokenizer: has `encode(text)`; the tokens that begin its documents are
      added.
    image_token: id of the placeholder.
    form: where those stand, and what ends the prompt; None for texts that have
      all special tokens, as a rendered conversation does.

  Raises:
    UserError: the tokenizer reads a placeholder in a text.
  """
  if form is None:
    return interleaved_ids(texts, images, tokenizer, image_token)
  *before, after = texts
  ids = interleaved_ids([*before, ""], images, tokenizer, image_token)
  last = text_ids(after, tokenizer, image_token, ids) if after else []
  last += tokenizer.encode(form.end) if form.end else []
  special = special_tokens.from_tokenizer(tokenizer)
  if form.begin == "after_images":
    return ids + special.prompt(last)
  return special.prompt(ids + last)


def interleaved_ids(
  texts: Sequence[str],
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  before: Sequence[int] = (),
  read: Callable[[str, Any, int, Sequence[int]], list[int]] | None = None,
) -> list[int]:
  """Returns the ids of texts with an image between each two.

  Args:
    texts, images, tokenizer, image_token: as for `joined_ids`.
    before: ids that they follow.
    read: makes ids of a text; None for `text_ids`.

  Raises:
    UserError: as for `joined_ids`.
  """
  read = text_ids if read is None else read
  ids: list[int] = []
  for text, pieces in zip(texts, [*images, ()], strict=True):
    if text:
      ids += read(text, tokenizer, image_token, ids or before)
    ids += image_ids(pieces, tokenizer, image_token)
  return ids


def text_ids(
  text: str, tokenizer: Any, image_token: int, before: Sequence[int]
) -> list[int]:
  """Returns the ids of a text, of which none stands for a feature.

  Args:
    text: without images.
    tokenizer, image_token: as for `joined_ids`.
    before: ids that it follows.

  Raises:
    UserError: it has a placeholder, which would take another one's feature.
  """
  ids = tokenizer.encode_after(before, text)
  if image_token in ids:
    raise UserError(
      f"text: found the placeholder of images in {text[:80]!r}, expected words"
      " alone: images stand for themselves. Take it out of the text"
    )
  return ids


def typed_ids(
  text: str, tokenizer: Any, image_token: int, before: Sequence[int]
) -> list[int]:
  """Returns the ids of a text, in which a placeholder is text as well.

  The tokenizer gets the placeholder's first character apart from the others.

  Args:
    text, tokenizer, image_token, before: as for `text_ids`.

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


def image_ids(
  pieces: Sequence[Piece], tokenizer: Any, image_token: int
) -> list[int]:
  """Returns the ids of what stands for an image.

  Args:
    pieces: from a preprocessor.
    tokenizer: of the language model.
    image_token: id of the placeholder.

  Raises:
    UserError: the tokenizer has no such token.
  """
  ids: list[int] = []
  for piece in pieces:
    if isinstance(piece, Soft):
      ids += [image_token] * piece.count
    elif isinstance(piece, Text):
      ids += tokenizer.encode(piece.text)
    else:
      ids.append(_token(piece.text, tokenizer))
  return ids


def _token(text: str, tokenizer: Any) -> int:
  """Returns the id of a token: a special one, or one of the vocabulary."""
  special = tokenizer.backend.token_to_id(text)
  ids = [special] if special is not None else tokenizer.encode(text)
  if len(ids) != 1:
    raise UserError(
      f"tokenizer: found no token {text!r}, which stands around images;"
      " expected the model's own tokenizer"
    )
  return ids[0]
