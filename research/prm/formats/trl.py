"""TRL's stepwise supervision: prompt, completions, labels.

Layout: TRL's documentation, "Dataset formats and types", stepwise supervision;
trl-lib/math_shepherd and trl-lib/prm800k are such sets. Labels are booleans, or
numbers from 0 to 1. Those of a file are all of one type: a loader of columns
refuses others.
"""

import dataclasses
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.prm.formats import files
from research.prm.labelled import LabelledSolution

_KNOWN = "prompt", "completions", "labels"


@dataclasses.dataclass(frozen=True)
class TRL:
  """TRL's stepwise supervision, in the standard (not conversational) form."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    steps = files.texts(record, "completions")
    kinds = bool, int, float
    labels = files.items(record, "labels", kinds, "a list of true and false")
    more = files.extra(record, _KNOWN)
    if any(type(x) is int for x in labels):
      more[files.NUMBERS] = True
    return [
      LabelledSolution(
        prompt=record.text("prompt"),
        steps=steps,
        labels=tuple(x if type(x) is float else int(x) for x in labels),
        segmenter_id="trl",
        extra=more,
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; labels are booleans unless they are numbers.

    A share of rollouts is a float, and stays one where all of them succeed.
    """
    more = dict(solution.extra)
    numbers = more.pop(files.NUMBERS, False)
    labels: list[Any] = list(solution.labels)
    if None in labels or not (numbers or float in map(type, labels)):
      labels = files.hard(solution, bool)
    return more | {
      "prompt": solution.prompt,
      "completions": list(solution.steps),
      "labels": labels,
    }


IGNORED = -100
"""Label of tokens that have no part in the loss, as in torch."""


def tokenize(
  solution: LabelledSolution,
  encode: Any,
  separator: str = "\n",
  bos: int | None = None,
) -> tuple[list[int], list[float | int]]:
  """Returns token ids and labels as TRL's `PRMTrainer.tokenize_row` does.

  Steps and separators are tokenised one by one: in a joined text the separator
  may merge with its neighbours, and its place would be lost. A step's label is
  that of its last separator token; all other tokens are ignored, and so is a
  step without a label.

  Args:
    solution: whose steps are without separators.
    encode: from a text to its token ids, without special tokens.
    separator: after each step.
    bos: first token, or None for tokenizers without one.
  """
  ids = ([] if bos is None else [bos]) + list(encode(solution.prompt))
  labels: list[float | int] = [IGNORED] * len(ids)
  after = list(encode(separator))
  for text, label in zip(solution.steps, solution.labels, strict=True):
    step = list(encode(text)) + after
    ids += step
    last = IGNORED if label is None else label
    labels += [IGNORED] * (len(step) - 1) + [last]
  return ids, labels
