r"""GenPRM: analysis, code and verdict on each step (Zhao et al. 2025).

Layout: huggingface.co/datasets/GenPRM/GenPRM-MATH-Data, dataset card. A chat:
system, then a user turn a step, each answered by `<analyze>`, `<verify>`
(Python code and what it printed) and `<output>` with \boxed{Yes} or \boxed{No}.
The code is text here: nothing executes it.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import LabelledSolution

SYSTEM = (
  "You are a math teacher. Your task is to review and critique the paragraphs"
  " in solution step by step."
)
_QUESTION = "Question: "
_OUTPUT = re.compile(r"<output>((?:(?!<output>).)*?)</output>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{(Yes|No)\}")


def decision(critique: str) -> tuple[int, int] | None:
  """Returns the label that a critique ends in, and where its word begins.

  The last `<output>` counts, and it has one verdict; None where it has not.
  """
  outputs = list(_OUTPUT.finditer(critique))
  verdicts = list(_BOXED.finditer(outputs[-1][1])) if outputs else []
  if len(verdicts) != 1:
    return None
  at = outputs[-1].start(1) + verdicts[0].start(1)
  return int(verdicts[0][1] == "Yes"), at


def verdict(critique: str) -> int | None:
  """Returns the label that a critique ends in, 1 or 0, or None for none."""
  decided = decision(critique)
  return None if decided is None else decided[0]


def turns(
  system: str, prompt: str, steps: Sequence[str], critiques: Sequence[str]
) -> list[tuple[str, str]]:
  """Returns the (role, text) of a chat of steps and critiques.

  Args:
    steps: first to last, at least one.
    critiques: one for each step, or for all but the last one, which is then
      asked for.
  """
  first, *rest = steps
  users = [f"{_QUESTION}{prompt}\n\n{first}", *rest]
  chat = [("system", system)]
  for i, user in enumerate(users):
    chat.append(("user", user))
    if i < len(critiques):
      chat.append(("assistant", critiques[i]))
  return chat


@dataclasses.dataclass(frozen=True)
class GenPRM:
  """GenPRM's training data; the first empty line parts question and step."""

  system: str = SYSTEM
  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's solution, with its critiques."""
    chat = files.chat(record, "conversations")
    roles = [role for role, _ in chat]
    steps = len(chat) // 2
    if not steps or roles != ["system"] + ["user", "assistant"] * steps:
      expected = "system, then user and assistant in turn"
      raise record.wrong("conversations", roles, expected)
    if chat[0][1] != self.system:
      expected = f"the system prompt {self.system[:40]!r}"
      raise record.wrong("conversations[0].content", chat[0][1], expected)
    question, gap, first = chat[1][1].partition("\n\n")
    if not gap or not question.startswith(_QUESTION):
      expected = f"{_QUESTION!r}, the question, an empty line, the first step"
      raise record.wrong("conversations[1].content", chat[1][1], expected)
    critiques = tuple(text for _, text in chat[2::2])
    labels = tuple(map(verdict, critiques))
    if None in labels:
      i = 2 + 2 * labels.index(None)
      expected = r"one \boxed{Yes} or \boxed{No} in its last <output>"
      name = f"conversations[{i}].content"
      raise record.wrong(name, chat[i][1][-60:], expected)
    return [
      LabelledSolution(
        prompt=question.removeprefix(_QUESTION),
        steps=(first, *(text for _, text in chat[3::2])),
        labels=labels,
        critiques=critiques,
        label_source="judge",
        segmenter_id="blank_line",
        extra=files.extra(record, ("conversations",)),
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; a solution needs a critique of every step."""
    files.check_steps(solution)
    if len(solution.critiques) != len(solution.steps):
      raise UserError(
        f"critiques: found {len(solution.critiques)}, expected"
        f" {len(solution.steps)}, one a step"
      )
    for i, critique in enumerate(solution.critiques):
      if verdict(critique) != solution.labels[i]:
        raise UserError(
          f"critiques[{i}]: found the verdict {verdict(critique)}, expected its"
          f" step's label {solution.labels[i]}"
        )
    if "\n\n" in solution.prompt:
      raise UserError("prompt: found an empty line, which would end it here")
    chat = turns(
      *(self.system, solution.prompt, solution.steps, solution.critiques)
    )
    return dict(solution.extra) | {"conversations": files.messages(chat)}
