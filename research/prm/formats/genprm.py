r"""GenPRM: analysis, code and verdict on each step (Zhao et al. 2025).

Layout: huggingface.co/datasets/GenPRM/GenPRM-MATH-Data, dataset card. A chat:
system, then a user turn a step, each answered by `<analyze>`, `<verify>`
(Python code and what it printed) and `<output>` with \boxed{Yes} or \boxed{No}.
The code is text here: nothing executes it.
"""

import dataclasses
import re
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


def verdict(critique: str) -> int | None:
  """Returns the label that a critique ends in, 1 or 0, or None for none.

  The last `<output>` counts, and it has one verdict.
  """
  outputs = _OUTPUT.findall(critique)
  found = _BOXED.findall(outputs[-1]) if outputs else []
  return int(found[0] == "Yes") if len(found) == 1 else None


@dataclasses.dataclass(frozen=True)
class GenPRM:
  """GenPRM's training data; the first empty line parts question and step."""

  system: str = SYSTEM
  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's solution, with its critiques."""
    turns = files.chat(record, "conversations")
    roles = [role for role, _ in turns]
    steps = len(turns) // 2
    if not steps or roles != ["system"] + ["user", "assistant"] * steps:
      expected = "system, then user and assistant in turn"
      raise record.wrong("conversations", roles, expected)
    if turns[0][1] != self.system:
      found, expected = turns[0][1], f"the system prompt {self.system[:40]!r}"
      raise record.wrong("conversations[0].content", found, expected)
    question, gap, first = turns[1][1].partition("\n\n")
    if not gap or not question.startswith(_QUESTION):
      expected = f"{_QUESTION!r}, the question, an empty line, the first step"
      raise record.wrong("conversations[1].content", turns[1][1], expected)
    critiques = tuple(text for _, text in turns[2::2])
    labels = tuple(map(verdict, critiques))
    if None in labels:
      i = 2 + 2 * labels.index(None)
      expected = r"one \boxed{Yes} or \boxed{No} in its last <output>"
      name = f"conversations[{i}].content"
      raise record.wrong(name, turns[i][1][-60:], expected)
    return [
      LabelledSolution(
        prompt=question.removeprefix(_QUESTION),
        steps=(first, *(text for _, text in turns[3::2])),
        labels=labels,
        critiques=critiques,
        label_source="judge",
        segmenter_id="blank_line",
        extra=files.extra(record, ("conversations",)),
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; a solution needs a critique of every step."""
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
    first, *rest = solution.steps
    users = [f"{_QUESTION}{solution.prompt}\n\n{first}", *rest]
    turns = [("system", self.system)]
    for user, critique in zip(users, solution.critiques, strict=True):
      turns += [("user", user), ("assistant", critique)]
    return dict(solution.extra) | {"conversations": files.messages(turns)}
