"""JSON Lines sources: texts, conversations, completions, preferences.

Each source reads files and selects a split by the hash of a field. Errors name
the file, the line and the field.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from research.data import examples, rendering
from research.data.examples import Example
from research.data.rendering import (
  Conversation,
  ConversationSource,
  check_near_misses,
)
from research.data.sources import FromFiles, Paths, Split, jsonl
from research.data.sources.jsonl import Record
from research.typing import UserError

Pair = tuple[Example, Example]
"""The chosen and the rejected answer, each with the same prompt before it."""

Completion = tuple[str, str]
"""A prompt and the text that follows it."""


class FromRecords(FromFiles):
  """Base of sources that are records of JSON Lines files."""

  split: Split | None
  key: str | None

  def check_files(self) -> None:
    """Raises UserError for the first wrong record, whatever its split."""
    jsonl.check_files(self.paths, self.key, self._parse)

  def _parsed(self) -> list[Any]:
    """Returns the fields of the split's records, after checking all records."""
    return jsonl.read(self.paths, self.split, self.key, self._parse)

  def _parse(self, record: Record) -> Any:
    """Returns a record's fields; raises UserError if one is wrong."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Texts(FromRecords):
  """Plain text documents: `{"text": ...}`.

  Attributes:
    paths: the files, see `sources.expand`.
    field: dotted path of the text.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
  """

  paths: Paths
  field: str = "text"
  split: Split | None = None
  key: str | None = None

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: int) -> str:
    return self.texts[index]

  @functools.cached_property
  def texts(self) -> list[str]:
    """The documents, read from the files once."""
    return self._parsed()

  def _parse(self, record: Record) -> str:
    return record.text(self.field)


@dataclasses.dataclass(frozen=True)
class Chat(FromRecords, ConversationSource):
  """Conversations: `{"messages": [{"role": ..., "content": ...}, ...]}`.

  Attributes:
    paths: the files, see `sources.expand`.
    field: dotted path of the messages.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
  """

  paths: Paths
  field: str = "messages"
  split: Split | None = None
  key: str | None = None

  def conversations(self) -> list[Conversation]:
    return self._parsed()

  def _parse(self, record: Record) -> Conversation:
    return Conversation(_messages(record, self.field), record.where)


@dataclasses.dataclass(frozen=True)
class Completions(FromRecords):
  """Prompts with completions: `{"prompt": ..., "completion": ...}`.

  No template is applied. The tokenizer's initial special tokens precede the
  prompt; its end token follows the completion and is part of the loss.

  Attributes:
    paths: the files, see `sources.expand`.
    prompt: dotted path of the prompt.
    completion: dotted path of the completion.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
  """

  paths: Paths
  prompt: str = "prompt"
  completion: str = "completion"
  split: Split | None = None
  key: str | None = None

  def examples(self, tokenizer: Any) -> Sequence[Example]:
    return [
      completion_example(tokenizer, prompt, answer)
      for prompt, answer in self._parsed()
    ]

  @property
  def texts(self) -> list[str]:
    """Prompts with completions as text, for contamination checks."""
    return [prompt + answer for prompt, answer in self._parsed()]

  def _parse(self, record: Record) -> Completion:
    return record.text(self.prompt), _said(record, self.completion)


@dataclasses.dataclass(frozen=True)
class Preferences(FromRecords):
  """Preference pairs: `{"prompt": ..., "chosen": ..., "rejected": ...}`.

  Fields are texts or lists of messages. Without a prompt field, the common
  first messages of `chosen` and `rejected` are the prompt.

  Attributes:
    paths: the files, see `sources.expand`.
    prompt: dotted path of the prompt.
    chosen: dotted path of the better answer.
    rejected: dotted path of the worse one.
    split: which records, by hash; None for all.
    key: field that decides the split; None for the whole record.
  """

  paths: Paths
  prompt: str = "prompt"
  chosen: str = "chosen"
  rejected: str = "rejected"
  split: Split | None = None
  key: str | None = None

  def pairs(self, tokenizer: Any) -> Sequence[Pair]:
    """Returns (chosen, rejected) pairs; the loss covers only the answers."""
    return [
      tuple(_example(tokenizer, said) for said in answers)
      for answers in self._parsed()
    ]

  def _parse(self, record: Record) -> tuple[Completion | Conversation, ...]:
    """Returns the chosen and the rejected answer, both after the prompt."""
    if isinstance(record.get(self.chosen), str):
      prompt = record.text(self.prompt)
      answers = (_said(record, x) for x in (self.chosen, self.rejected))
      return tuple((prompt, answer) for answer in answers)
    answers = [_messages(record, x) for x in (self.chosen, self.rejected)]
    fields = self.prompt, self.chosen, self.rejected
    check_near_misses(record.values, fields, record.where)
    if record.get(self.prompt) is not None:
      prompt = _messages(record, self.prompt)
      answers = [[*prompt, *answer] for answer in answers]
      shared = len(prompt)
    else:
      alike = (a == b for a, b in zip(*answers, strict=False))
      shared = next((i for i, same in enumerate(alike) if not same), None)
      if shared is None:
        raise record.wrong(
          self.chosen, answers[0], "another answer than the rejected one"
        )
    return tuple(Conversation(a, record.where, shared) for a in answers)


def _example(tokenizer: Any, said: Completion | Conversation) -> Example:
  if isinstance(said, Conversation):
    return rendering.example(tokenizer, said)
  return completion_example(tokenizer, *said)


def completion_example(tokenizer: Any, prompt: str, answer: str) -> Example:
  """Tokenises `prompt` followed by `answer`; the loss covers the answer."""
  end = [] if tokenizer.eos is None else [tokenizer.eos]
  before = tokenizer.prompt(prompt)
  # Behind an empty prompt the answer is as it is alone, whatever begins a row.
  after = tokenizer.encode_after(tokenizer.encode(prompt), answer)
  return examples.join([(before, False), ([*after, *end], True)])


def _messages(record: Record, path: str) -> list[Any]:
  found = record.get(path)
  if not isinstance(found, list) or not found:
    raise record.wrong(path, found, "a list of messages")
  return found


def _said(record: Record, path: str) -> str:
  found = record.text(path)
  if not found:
    raise UserError(
      f"{record.where}: field {path!r}: found no text, expected an answer."
    )
  return found
