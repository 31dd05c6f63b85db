"""What a policy reads of a problem, and the text of what it writes.

Each is a `reasoning.prompting.Prompting`; others are in `vlm.prompts`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Plain:
  """The question in a template.

  Attributes:
    template: with `{question}` in it.
  """

  template: str = "{question}"

  def __call__(self, tokenizer: Any, question: str) -> list[int]:
    return tokenizer.prompt(self.template.replace("{question}", question))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
  """The question as a user's message.

  Attributes:
    system: the message before it; None for the template's own.
    template: the user's message, with `{question}` in it.
  """

  system: str | None = None
  template: str = "{question}"

  def __call__(self, tokenizer: Any, question: str) -> list[int]:
    text = self.template.replace("{question}", question)
    messages = [{"role": "user", "content": text}]
    if self.system is not None:
      messages.insert(0, {"role": "system", "content": self.system})
    return tokenizer.encode(tokenizer.chat(messages))


class IdWords:
  """The tokenizer of a model that has none: its texts are ids with spaces."""

  stop: tuple[int, ...] = ()

  def prompt(self, text: str) -> list[int]:
    return self.encode(text)

  def encode(self, text: str) -> list[int]:
    """Returns the ids that a text lists.

    Raises:
      UserError: it has other words; the model has no tokenizer for them.
    """
    words = text.split()
    if not all(word.isdecimal() for word in words):
      raise UserError(
        f"prompt: found {text!r:.60}, expected ids such as '3 19 7': this model"
        " has no tokenizer.\nGive it one, such as FromScratch.tokenizer ="
        " @words.WordVocabulary()"
      )
    return [int(word) for word in words]

  def decode(self, ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids)
