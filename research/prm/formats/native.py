"""Our own layout, a superset: counts of rollouts, and where labels are from."""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.prm.formats import files
from research.prm.labelled import LabelledSolution
from research.reasoning.trace import MonteCarlo

_TEXTS = "problem_id", "prompt", "label_source", "policy_id", "segmenter_id"
_KNOWN = (
  *_TEXTS,
  *("steps", "step_labels", "step_mc", "first_error", "final_correct"),
  "critiques",
)


@dataclasses.dataclass(frozen=True)
class Native:
  """Our layout; every field of a solution has its place."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's solution; `first_error` must be its labels'."""
    kinds = int, float, type(None)
    labels = files.items(
      record, "step_labels", kinds, "0 to 1, or null, a step"
    )
    correct = record.get("final_correct")
    if correct is not None:
      files.boolean(record, "final_correct")
    critiques = record.get("critiques")
    solution = LabelledSolution(
      **{name: record.text(name) for name in _TEXTS},
      steps=files.texts(record, "steps"),
      labels=tuple(labels),
      mc=_counts(record),
      critiques=() if critiques is None else files.texts(record, "critiques"),
      final_correct=correct,
      extra=files.extra(record, _KNOWN),
    )
    if record.get("first_error") != solution.first_error:
      was, expected = record.get("first_error"), solution.first_error
      raise record.wrong("first_error", was, f"{expected}, as step_labels say")
    return [solution]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    counts = solution.mc and [
      x and {"c": x.correct, "k": x.rollouts} for x in solution.mc
    ]
    return dict(solution.extra) | {
      **{name: getattr(solution, name) for name in _TEXTS},
      "steps": list(solution.steps),
      "step_labels": list(solution.labels),
      "step_mc": counts,
      "first_error": solution.first_error,
      "final_correct": solution.final_correct,
      "critiques": list(solution.critiques),
    }


def _counts(record: Record) -> tuple[MonteCarlo | None, ...] | None:
  if record.get("step_mc") is None:
    return None
  expected = "null, or c of k rollouts, a step"
  rows = files.items(record, "step_mc", (dict, type(None)), expected)
  counts: list[MonteCarlo | None] = []
  for i, row in enumerate(rows):
    if row is None:
      counts.append(None)
      continue
    c, k = row.get("c"), row.get("k")
    if type(c) is not int or type(k) is not int or len(row) != 2:
      raise record.wrong(f"step_mc[{i}]", row, expected)
    counts.append(MonteCarlo(c, k))
  return tuple(counts)
