"""Conversations of several turns, with images in the user's messages.

The model's chat template renders the texts of all messages, in which a `MARK`
stands for an image. Then what stands for each image in the prompt takes the
place of its mark. A mark or a placeholder that somebody typed stays text.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data import rendering
from research.data.examples import Example
from research.data.rendering import Conversation
from research.typing import UInt8, UserError
from research.vlm.images import prompt_ids
from research.vlm.images.prompts import MARK, Piece, PromptFormat

_TYPED = "\ufdd0"
"""A typed `MARK`, while a template renders it: a noncharacter of Unicode."""


@dataclasses.dataclass(frozen=True)
class ChatSample:
  """A conversation about images; the loss covers the assistant's messages.

  Attributes:
    images: uint8 RGB, each `[H, W, 3]`, in the order of their marks.
    conversation: whose messages `join_texts` made.
  """

  images: tuple[UInt8[np.ndarray, "..."], ...]
  conversation: Conversation


def join_texts(texts: Sequence[str]) -> str:
  """Returns the content of a message: texts with an image between each two.

  Args:
    texts: without images; a `MARK` in them is text.

  Raises:
    UserError: a text has the character that a typed `MARK` becomes.
  """
  for text in texts:
    if _TYPED in text:
      raise UserError(
        f"found U+FDD0 in {text[:60]!r}, expected text: Unicode reserves it"
      )
  return MARK.join(text.replace(MARK, _TYPED) for text in texts)


def tokens_of(
  sample: ChatSample,
  images: Sequence[tuple[Piece, ...]],
  tokenizer: Any,
  image_token: int,
  form: PromptFormat = PromptFormat(),
) -> Example:
  """Returns a conversation's tokens; the loss covers the assistant's.

  Up to the last message in the loss they are the prompt that the model answers
  where it is asked. Earlier answers are learned as they stand in it.

  Args:
    images: what stands for each image.
    form: the format of prompts that the model was trained with.

  Raises:
    UserError: the template fails, leaves images out, or has the model generate
      them.
  """
  parts = rendering.pieces(tokenizer, sample.conversation, MARK)
  found = sum(text.count(MARK) for text, _ in parts)
  if found != len(images) or any(on and MARK in text for text, on in parts):
    raise UserError(
      f"{sample.conversation.where}: chat template: found {found} times {MARK}"
      f" in the rendered conversation, expected {len(images)}, all of them in"
      " the user's messages.\nUse the template of a model that reads images."
    )
  prompt, answer = _as_asked(parts, form.end)
  count = sum(text.count(MARK) for text, _ in prompt)
  placed, special = prompt_ids.place_begin(images[:count], tokenizer, form)
  left = iter([*placed, *images[count:]])

  def encode(before: Sequence[int], text: str) -> list[int]:
    texts = text.split(MARK)
    return prompt_ids.interleaved_ids(
      [each.replace(_TYPED, MARK) for each in texts],
      list(itertools.islice(left, len(texts) - 1)),
      tokenizer,
      image_token,
      before,
      prompt_ids.typed_ids,
    )

  example = rendering.encoded([*prompt, *answer], encode, tokenizer.stop)
  ids = special.prompt(example.tokens.tolist())
  added = len(ids) - len(example.tokens)
  mask = np.pad(example.loss_mask, (added, 0))
  return Example(np.asarray(ids, np.int32), mask)


def _as_asked(
  parts: list[tuple[str, bool]], end: str
) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
  """Returns the parts before the last one in the loss, ended, and the rest."""
  last = max((i for i, (_, on) in enumerate(parts) if on), default=len(parts))
  prompt = parts[:last]
  if end:
    text = prompt.pop()[0] if prompt and not prompt[-1][1] else ""
    prompt.append((text + end, False))
  return prompt, parts[last:]
