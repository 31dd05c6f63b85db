"""ProcessBench: the first wrong step, by people (Zheng et al. 2024).

Layout: huggingface.co/datasets/Qwen/ProcessBench and its repository's README.
`label` is the index of the first wrong step, -1 where there is none; steps
after it have no label.
"""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import LabelledSolution, labels_until

_KNOWN = (
  *("id", "generator", "problem", "steps"),
  *("final_answer_correct", "label"),
)


@dataclasses.dataclass(frozen=True)
class ProcessBench:
  """ProcessBench, each of its four subsets."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    steps = files.texts(record, "steps")
    label = record.get("label")
    if type(label) is not int or not -1 <= label < len(steps):
      expected = f"-1 (no error) to {len(steps) - 1}"
      raise record.wrong("label", label, expected)
    return [
      LabelledSolution(
        prompt=record.text("problem"),
        steps=steps,
        labels=labels_until(label, len(steps)),
        final_correct=files.boolean(record, "final_answer_correct"),
        problem_id=record.text("id"),
        policy_id=record.text("generator"),
        label_source="human_first_error",
        segmenter_id="processbench",
        extra=files.extra(record, _KNOWN),
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; labels after the first error are left out."""
    if solution.first_error is None:
      raise UserError(
        "labels: found an unknown one before the first error, expected all of"
        " them: ProcessBench's label is the first wrong step"
      )
    return dict(solution.extra) | {
      "id": solution.problem_id,
      "generator": solution.policy_id,
      "problem": solution.prompt,
      "steps": list(solution.steps),
      "final_answer_correct": solution.final_correct,
      "label": solution.first_error,
    }
