"""RLHFlow: a chat in which the assistant says "+" or "-" after each step.

Layout: github.com/RLHFlow/RLHF-Reward-Modeling, math-rm/README;
huggingface.co/datasets/RLHFlow/Mistral-PRM-Data. The first user turn is the
problem and the first step, and nothing in a record says where one ends and the
other starts.
"""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.prm.formats import files
from research.prm.labelled import LabelledSolution


@dataclasses.dataclass(frozen=True)
class RLHFlow:
  """RLHFlow's PRM data.

  Attributes:
    problems: known problems, by which the first turn is parted. Of others the
      prompt is "" and the first step has the problem in it: labels belong to
      ends of steps, which is the same either way.
    joiner: between problem and first step: a space, or an empty line as in
      ProcessBench's script.
  """

  problems: tuple[str, ...] = ()
  joiner: str = " "
  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    turns = files.chat(record, "conversations")
    roles = [role for role, _ in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
      raise record.wrong("conversations", roles, "user and assistant, in turn")
    labels = [
      files.choice(record, f"conversations[{i}].content", text, _SIGNS)
      for i, (_, text) in enumerate(turns)
      if i % 2
    ]
    prompt, first = self._part(turns[0][1])
    return [
      LabelledSolution(
        prompt=prompt,
        steps=(first, *(text for _, text in turns[2::2])),
        labels=tuple(labels),
        label_source="monte_carlo_hard",
        segmenter_id="rlhflow",
        extra=files.extra(record, ("conversations",)),
      )
    ]

  def _part(self, turn: str) -> tuple[str, str]:
    starts = [x for x in self.problems if turn.startswith(x + self.joiner)]
    if not starts:
      return "", turn
    problem = max(starts, key=len)
    return problem, turn[len(problem + self.joiner) :]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    files.check_steps(solution)
    signs = files.hard(solution, "-+".__getitem__)
    steps = list(solution.steps)
    if solution.prompt:
      steps[0] = f"{solution.prompt}{self.joiner}{steps[0]}"
    turns = [
      turn
      for step, sign in zip(steps, signs, strict=True)
      for turn in (("user", step), ("assistant", sign))
    ]
    return dict(solution.extra) | {"conversations": files.messages(turns)}


_SIGNS = {"+": 1, "-": 0}
