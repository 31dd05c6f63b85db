"""Where a step of a solution ends: where a policy's rows pause."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.generation.boundary import Boundary
from research.text import separators
from research.typing import UserError


@runtime_checkable
class StepEnds(Protocol):
  """Makes the boundary of steps for a vocabulary."""

  def __call__(self, tokenizer: Any, vocab_size: int) -> Boundary | None:
    """Returns the boundary; None where solutions are one step."""
    ...


@dataclasses.dataclass(frozen=True)
class AtEnd:
  """A solution is one step: what an outcome reward model scores."""

  def __call__(self, tokenizer: Any, vocab_size: int) -> Boundary | None:
    del tokenizer, vocab_size
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtText:
  r"""A step ends with a text, such as a blank line.

  Attributes:
    text: wherever the tokenizer cuts it.
    max_tokens: tokens of a step at most.
  """

  text: str = "\n\n"
  max_tokens: int = 256

  def __call__(self, tokenizer: Any, vocab_size: int) -> Boundary | None:
    texts = separators.token_texts(tokenizer, vocab_size)
    automaton = separators.separator_automaton(texts, self.text.encode())
    return Boundary(*automaton, np.int32(self.max_tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtWord:
  """A step ends with a word that is one token.

  Attributes:
    word: such as the semicolon of countdown, or an id of a model that has no
      tokenizer.
    max_tokens: tokens of a step at most.
  """

  word: str = ";"
  max_tokens: int = 256

  def __call__(self, tokenizer: Any, vocab_size: int) -> Boundary | None:
    """Returns the boundary.

    Raises:
      UserError: the word is not one token.
    """
    ids = tokenizer.encode(self.word)
    if len(ids) != 1 or ids[0] >= vocab_size:
      raise UserError(
        f"AtWord.word: found {self.word!r}, which is the tokens {ids}, expected"
        " a word that is one token; AtText finds others."
      )
    ends = np.zeros((1, vocab_size), bool)
    ends[0, ids[0]] = True
    return Boundary(
      np.zeros_like(ends, np.int32), ends, np.int32(self.max_tokens)
    )


@dataclasses.dataclass(frozen=True)
class EveryTokens:
  """A step is so many tokens."""

  count: int = 16

  def __call__(self, tokenizer: Any, vocab_size: int) -> Boundary | None:
    del tokenizer
    none = np.zeros((1, vocab_size), bool)
    same = np.zeros_like(none, np.int32)
    return Boundary(same, none, np.int32(self.count))
