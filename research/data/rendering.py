"""Renders and tokenises conversations; the loss covers assistant messages only.

The loss mask follows from the rendering, never from a search in the text:

* A template with `{% generation %}` marks the assistant's text itself.
* Otherwise the conversation is rendered up to each assistant message, with the
  generation prompt, and then including the message. The first text must be a
  prefix of the second, and the second one of the whole; the difference is what
  the model must generate. This is checked for every conversation. Templates
  that rewrite earlier turns (for example to drop reasoning) are rejected.

The parts are tokenised separately, as at generation time: the prompt is
tokenised, and the model's own tokens follow. Text after the last stop token of
a turn (SmolLM2's line break) is excluded from the loss, since generation ends
before it.
"""

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from research.data import examples
from research.data.examples import Example
from research.text.tokenizer import Tokenizer
from research.typing import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"

Encode = Callable[[Sequence[int], str], list[int]]
"""Returns the ids of a text that follows other ids."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation for training.

  Attributes:
    messages: `{"role", "content"}` and any other fields that the template
      reads; assistant messages with `"weight": 0` are excluded from the loss.
    where: file and line, for errors.
    first: messages before this index are excluded from the loss.
  """

  messages: Sequence[Any]
  where: str
  first: int = 0

  def __post_init__(self):
    for i, message in enumerate(self.messages):
      _check_message(message, f"{self.where}: message {i}")
    if not self.trained_messages:
      raise UserError(
        f"{self.where}: found {len(self.messages)} messages, none by the"
        " assistant to train on.\nExpected at least one (with no weight 0)."
      )

  @property
  def trained_messages(self) -> list[int]:
    """The indices of the messages that the loss covers."""
    return [
      i
      for i, message in enumerate(self.messages)
      if message["role"] == ASSISTANT
      and i >= self.first
      and message.get("weight", 1)
    ]


FIELDS = (
  *("role", "content", "weight", "name", "tool_calls", "tool_call_id"),
  *("reasoning_content", "thinking", "images"),
)
"""Fields of messages: what a misspelt one would have said is not left out."""


def check_near_misses(
  names: Iterable[str], known: Sequence[str], where: str
) -> None:
  """Refuses names that are none of the known fields, and nearly one.

  Others are the user's own, and ignored.
  """
  for name in names:
    near = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    if near and name not in known:
      raise UserError(
        f"{where}: field {name!r}: did you mean {near[0]!r}? It would be"
        " ignored: correct it, or give it another name."
      )


def _check_message(message: Any, where: str) -> None:
  if not isinstance(message, dict):
    raise UserError(
      f"{where}: found {type(message).__name__}, expected an object:"
      ' {"role": ..., "content": ...}.'
    )
  check_near_misses(message, FIELDS, where)
  role, content = message.get("role"), message.get("content")
  if not isinstance(role, str) or role not in ROLES:
    raise UserError(
      f"{where}: role: found {str(role)[:40]!r}, expected one of"
      f" {', '.join(ROLES)}."
    )
  calls = role == ASSISTANT and content is None and message.get("tool_calls")
  if not isinstance(content, str) and not calls:
    raise UserError(
      f"{where} ({role}): content: found {type(content).__name__}, expected"
      " text."
    )
  if message.get("weight", 1) not in (0, 1):
    raise UserError(
      f"{where} ({role}): weight: found {str(message['weight'])[:40]!r},"
      " expected 0 or 1."
    )


def example(tokenizer: Tokenizer, conversation: Conversation) -> Example:
  """Renders and tokenises a conversation.

  Raises:
    UserError: there is no chat template, it fails, or the assistant's text
      cannot be located in its output.
  """
  parts = pieces(tokenizer, conversation)
  return encoded(parts, tokenizer.encode_after, tokenizer.stop)


def encoded(
  rendered: Sequence[tuple[str, bool]], encode: Encode, stop: Sequence[int]
) -> Example:
  """Tokenises a rendered conversation.

  Args:
    rendered: its parts, from `pieces`.
    encode: makes ids of a part.
    stop: ids that end a turn.
  """
  parts: list[tuple[list[int], bool]] = []
  for text, learned in rendered:
    before = next((ids for ids, _ in reversed(parts) if ids), [])
    parts += _tokens(encode(before, text), stop, learned)
  return examples.join(parts)


def plain_text(conversation: Conversation) -> str:
  """Returns the contents of all messages, without a template."""
  return "\n".join(m["content"] or "" for m in conversation.messages)


class ConversationSource(abc.ABC):
  """A source of examples whose examples are conversations."""

  @abc.abstractmethod
  def conversations(self) -> list[Conversation]:
    """Returns the validated conversations."""

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    """Returns the rendered conversations; the loss covers the assistant."""
    return [example(tokenizer, c) for c in self.conversations()]

  @property
  def texts(self) -> list[str]:
    """The message contents without the template, for contamination checks."""
    return [plain_text(c) for c in self.conversations()]


def pieces(
  tokenizer: Tokenizer, conversation: Conversation, image: str | None = None
) -> list[tuple[str, bool]]:
  """Returns the rendered conversation in parts: (text, in the loss).

  Args:
    tokenizer: of the model, with its chat template.
    conversation: of texts.
    image: what stands for an image in a text; None if nothing does.

  Raises:
    UserError: as for `example`.
  """
  # "weight" is not a field of chat templates.
  messages = [
    {k: v for k, v in m.items() if k != "weight"} for m in conversation.messages
  ]
  try:
    marked = tokenizer.chat_marked(messages, image)
    if marked is not None:
      return _by_marks(*marked, conversation)
    return _by_prefixes(tokenizer, messages, conversation, image)
  except UserError as error:
    if conversation.where in str(error):
      raise
    raise UserError(f"{conversation.where}: {error}") from error


def _by_marks(text, spans, conversation) -> list[tuple[str, bool]]:
  said = [
    i for i, m in enumerate(conversation.messages) if m["role"] == ASSISTANT
  ]
  chosen = conversation.trained_messages
  if chosen != said:
    if len(spans) != len(said):
      raise UserError(
        f"{conversation.where}: the chat template marks {len(spans)} parts"
        f" {{% generation %}}, but {len(said)} messages are the assistant's,"
        " and some are excluded from the loss.\n"
        "Train on all of them, or use another template."
      )
    spans = [s for s, i in zip(spans, said, strict=True) if i in chosen]
  out, place = [], 0
  for start, stop in spans:
    out += [(text[place:start], False), (text[start:stop], True)]
    place = stop
  return [part for part in [*out, (text[place:], False)] if part[0]]


def _by_prefixes(
  tokenizer, messages, conversation, image
) -> list[tuple[str, bool]]:
  whole = tokenizer.chat(messages, False, image)
  out, place = [], 0
  for i in conversation.trained_messages:
    opened = tokenizer.chat(messages[:i], True, image)
    said = tokenizer.chat(messages[: i + 1], False, image)
    where = f"{conversation.where}: message {i} ({ASSISTANT})"
    if not said.startswith(opened):
      raise _no_prefix(
        where, "renders the generation prompt unlike the turn itself", i
      )
    if not whole.startswith(said):
      raise _no_prefix(where, "rewrites it once other messages follow", i)
    out += [(whole[place : len(opened)], False), (said[len(opened) :], True)]
    place = len(said)
  return [part for part in [*out, (whole[place:], False)] if part[0]]


def _no_prefix(where: str, what: str, i: int) -> UserError:
  return UserError(
    f"{where}: the chat template {what}, so the text to generate is not"
    " defined.\nUse a template that marks it with {% generation %}, or"
    f" conversations that end with message {i}."
  )


def _tokens(ids, stop, learned) -> list[tuple[list[int], bool]]:
  if not learned:
    return [(ids, False)]
  ends = [i + 1 for i, token in enumerate(ids) if token in stop]
  end = ends[-1] if ends else len(ids)
  return [(ids[:end], True), (ids[end:], False)]
