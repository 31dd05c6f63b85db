"""PRMBench: solutions with errors of nine kinds put in (Song et al. 2025).

Layout: github.com/ssmisya/PRMBench, docs, "Data Format". `error_steps` count
from 1, and name every wrong step, not only the first.
"""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import LabelledSolution

_KNOWN = "modified_question", "modified_process", "error_steps", "idx"
REDUNDANCY = "redundency"
"""The benchmark's spelling of the class whose originals it evaluates, too."""


@dataclasses.dataclass(frozen=True)
class PRMBench:
  """PRMBench: the modified solution; the original is in `extra`."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's modified solution."""
    steps = files.texts(record, "modified_process")
    errors = files.items(record, "error_steps", int, "numbers of steps, from 1")
    for i, x in enumerate(errors):
      if not 1 <= x <= len(steps):
        raise record.wrong(f"error_steps[{i}]", x, f"1 to {len(steps)}")
    if list(errors) != sorted(set(errors)):
      raise record.wrong("error_steps", errors, "each once, in order")
    record.text("classification")
    return [
      LabelledSolution(
        prompt=record.text("modified_question"),
        steps=steps,
        labels=tuple(int(i not in errors) for i in range(1, len(steps) + 1)),
        problem_id=record.text("idx"),
        label_source="constructed",
        segmenter_id="prmbench",
        extra=files.extra(record, _KNOWN),
      )
    ]

  def original(self, record: Record) -> LabelledSolution:
    """Returns the solution before it was modified, all of it right."""
    steps = files.texts(record, "original_process")
    return LabelledSolution(
      prompt=record.text("original_question"),
      steps=steps,
      labels=(1,) * len(steps),
      problem_id=f"correct_{record.text('idx')}",
      label_source="constructed",
      segmenter_id="prmbench",
      extra={"classification": "correct"},
    )

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    if "classification" not in solution.extra:
      raise UserError(
        "extra: found no classification, expected the error's kind"
      )
    right = files.hard(solution, bool)
    return dict(solution.extra) | {
      "modified_question": solution.prompt,
      "modified_process": list(solution.steps),
      "error_steps": [i for i, x in enumerate(right, start=1) if not x],
      "idx": solution.problem_id,
    }
