"""What a model reads of a question: tokens, and arrays beside them.

A `Prompting` makes the prompt of a question, and is the same in rows of
training, in labels of steps and in searches. Where the prompt is more than
tokens, such as an image of the question, it is a `PromptWithArrays`, which goes
wherever a prompt's tokens go.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from research.errors import UserError


@runtime_checkable
class Prompting(Protocol):
  """Makes a prompt of a question."""

  def __call__(self, tokenizer: Any, question: str) -> Sequence[int]:
    """Returns the prompt's tokens; equal questions have equal prompts."""
    ...


def as_text(tokenizer: Any, question: str) -> Sequence[int]:
  """Returns the question's tokens, after those that begin a document."""
  return tokenizer.prompt(question)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptWithArrays(Sequence[int]):
  """The tokens of a prompt, and what a model reads beside them.

  Attributes:
    tokens: ids, of which some are placeholders of an image.
    arrays: a batch's further arrays, of this row, such as `pixels`, uint8
      `[V, H, W, 3]`.
  """

  tokens: tuple[int, ...]
  arrays: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, index: Any) -> Any:
    return self.tokens[index]

  def followed_by(self, tokens: Sequence[int]) -> "PromptWithArrays":
    """Returns the prompt with more tokens behind it."""
    return dataclasses.replace(self, tokens=(*self.tokens, *tokens))


def followed_by(prompt: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
  """Returns a prompt with more tokens behind it, and its arrays if any."""
  if isinstance(prompt, PromptWithArrays):
    return prompt.followed_by(tokens)
  return [*prompt, *tokens]


def arrays_of(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
  """Returns the arrays of prompts by name, `[B, ...]`; none of plain tokens.

  Raises:
    UserError: prompts have arrays of different names or shapes.
  """
  each = [x.arrays if isinstance(x, PromptWithArrays) else {} for x in prompts]
  shapes = [{name: x.shape for name, x in arrays.items()} for arrays in each]
  for i, shape in enumerate(shapes):
    if shape != shapes[0]:
      raise UserError(
        f"prompts: found arrays of shapes {shapes[0]} with the first and"
        f" {shape} with number {i + 1}, expected the same with all; draw all"
        " images at one size"
      )
  first = each[0] if each else {}
  return {name: np.stack([arrays[name] for arrays in each]) for name in first}
