"""The ids of a prompt: its texts, what stands for images, special tokens.

Rows, evaluation and the command line make their prompts here, so that a model
is asked as it was trained.
"""

from collections.abc import Sequence
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
  *before, after = texts
  ids: list[int] = []
  for text, pieces in zip(before, images, strict=True):
    ids += text_ids(text, tokenizer, image_token, ids) if text else []
    ids += image_ids(pieces, tokenizer, image_token)
  last = text_ids(after, tokenizer, image_token, ids) if after else []
  if form is None:
    return ids + last
  last += tokenizer.encode(form.end) if form.end else []
  special = special_tokens.from_tokenizer(tokenizer)
  if form.begin == "after_images":
    return ids + special.prompt(last)
  return special.prompt(ids + last)


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
