"""PRM800K: human ratings of steps, with alternatives (Lightman et al. 2023).

Layout: github.com/openai/prm800k, README. A record has several solutions: the
path that labellers chose, and the chosen prefix with each alternative that they
rated at its end. Alternatives of different steps are never crossed: a later
step follows the chosen prefix alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import Label, LabelledSolution

_FINISH = ("found_error", "solution", "bad_problem", "give_up")


@dataclasses.dataclass(frozen=True)
class PRM800K:
  """PRM800K, both phases.

  Attributes:
    neutral: label of steps rated 0, neither wrong nor of use: 1 as in Lightman
      et al., or None to leave them out of the loss.
  """

  neutral: Label = 1
  single: ClassVar[bool] = False

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the chosen path and each rated alternative after its prefix.

    A record of quality control or screening, or without a result ("give_up",
    "bad_problem"), has none.
    """
    problem = record.text("question.problem")
    reason = record.text("label.finish_reason")
    files.choice(
      record, "label.finish_reason", reason, dict.fromkeys(_FINISH, True)
    )
    paths = list(self._paths(record))
    if (
      files.boolean(record, "is_quality_control_question")
      or files.boolean(record, "is_initial_screening_question")
      or reason in ("bad_problem", "give_up")
    ):
      return []
    return [
      LabelledSolution(
        prompt=problem,
        steps=steps,
        labels=labels,
        final_correct=True if chosen and reason == "solution" else None,
        label_source="human",
        segmenter_id="newline",
      )
      for steps, labels, chosen in paths
    ]

  def _paths(
    self, record: Record
  ) -> Iterator[tuple[tuple[str, ...], tuple[Label, ...], bool]]:
    """Yields steps, labels, and whether the path is the chosen one."""
    steps: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    whole, alternatives = True, []
    rows = files.items(record, "label.steps", dict, "a list of steps")
    for i, values in enumerate(rows):
      step = Record(values, f"{record.where}: label.steps[{i}]")
      rated = self._completions(step)
      chosen = _chosen(step, len(rated))
      alternatives += [
        (steps + (text,), labels + (label,))
        for j, (text, label) in enumerate(rated)
        if j != chosen
      ]
      text, label = rated[chosen] if chosen is not None else _human(step)
      if text is None:
        if i + 1 < len(rows):
          raise step.wrong(
            "chosen_completion", None, "one of a step that goes on"
          )
        whole = False
        break
      steps, labels = steps + (text,), labels + (label,)
    if steps and whole:
      yield steps, labels, True
    for alternative in alternatives:
      yield *alternative, False

  def _completions(self, step: Record) -> list[tuple[str, Label]]:
    ratings = {-1: 0, 0: self.neutral, 1: 1, None: None}
    completions = []
    rows = files.items(step, "completions", dict, "a list of completions")
    for i, values in enumerate(rows):
      row = Record(values, f"{step.where}: completions[{i}]")
      label = files.choice(row, "rating", row.get("rating"), ratings)
      completions.append((row.text("text"), label))
    return completions

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns a record of phase 2 with this path, one completion a step."""
    ratings = {0: -1, 1: 1, None: None}
    for i, label in enumerate(solution.labels):
      if label not in ratings:
        raise UserError(f"labels[{i}]: found {label}, expected 0, 1 or None")
    wrong = 0 in solution.labels
    if not wrong and not solution.final_correct:
      raise UserError(
        "final_correct: found no error and no correct answer; expected either,"
        " which PRM800K's finish_reason says"
      )
    steps = [
      {
        "completions": [
          {"text": text, "rating": ratings[label], "flagged": None}
        ],
        "human_completion": None,
        "chosen_completion": 0,
      }
      for text, label in zip(solution.steps, solution.labels, strict=True)
    ]
    return dict(solution.extra) | {
      "is_quality_control_question": False,
      "is_initial_screening_question": False,
      "question": {"problem": solution.prompt},
      "label": {
        "steps": steps,
        "finish_reason": "found_error" if wrong else "solution",
      },
    }


def _chosen(step: Record, n: int) -> int | None:
  chosen = step.get("chosen_completion")
  if chosen is None:
    return None
  if type(chosen) is not int or not 0 <= chosen < n:
    raise step.wrong("chosen_completion", chosen, f"null, or 0 to {n - 1}")
  return chosen


def _human(step: Record) -> tuple[str | None, Label]:
  """Returns the labeller's own step, which counts as right, or None."""
  completion = step.get("human_completion")
  text = completion.get("text") if isinstance(completion, dict) else completion
  if text is not None and not isinstance(text, str):
    raise step.wrong(
      "human_completion", completion, "a text, or an object with one"
    )
  return text, 1
