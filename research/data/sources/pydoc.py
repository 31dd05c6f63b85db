"""Chat and preference data from the Python language reference, offline.

Like `sources.PydocTopics`, these need no download: every Python installation
has the text. The split is that of the topic's name.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.data import rendering
from research.data.rendering import Conversation, ConversationSource
from research.data.sources import PydocTopics, Split
from research.data.sources.records import Pair


def _answer(text: str, size: int) -> str:
  """Returns the first paragraphs of a topic, at least one."""
  out = ""
  for paragraph in text.strip().split("\n\n"):
    if out and len(out) + len(paragraph) > size:
      break
    out += ("\n\n" if out else "") + paragraph
  return out[:size]


def _conversation(name: str, answer: str) -> Conversation:
  question = f'What does the Python reference say about "{name}"?'
  return Conversation(
    (
      {"role": "user", "content": question},
      {"role": "assistant", "content": answer},
    ),
    f"pydoc topic {name!r}",
  )


@dataclasses.dataclass(frozen=True)
class Questions(ConversationSource):
  """A question about each topic, answered by the beginning of its text.

  Attributes:
    split: which topics.
    size: maximum number of characters of an answer.
  """

  split: Split = "train"
  size: int = 500

  def conversations(self) -> list[Conversation]:
    """Returns one conversation for each topic."""
    topics = PydocTopics(self.split)
    return [
      _conversation(name, _answer(topics[i], self.size))
      for i, name in enumerate(topics.names)
    ]


@dataclasses.dataclass(frozen=True)
class Preferences:
  """Prefers the answer of the right topic over that of another topic.

  Attributes:
    split: which topics.
    size: maximum number of characters of an answer.
  """

  split: Split = "train"
  size: int = 300

  def pairs(self, tokenizer: Any) -> Sequence[Pair]:
    """Returns (chosen, rejected) for each topic."""
    topics = PydocTopics(self.split)
    answers = [_answer(topics[i], self.size) for i in range(len(topics))]
    wrong = answers[1:] + answers[:1]
    return [
      tuple(
        rendering.example(tokenizer, _conversation(name, answer))
        for answer in (chosen, rejected)
      )
      for name, chosen, rejected in zip(
        topics.names, answers, wrong, strict=True
      )
    ]
