r"""ThinkPRM: one chain that verifies all steps (Khalifa et al. 2025).

Layout: huggingface.co/datasets/launch/thinkprm-1K-verification-cots, dataset
card. `cot` ends its part on each step with \boxed{correct} or
\boxed{incorrect}; published chains are those whose verdicts are PRM800K's
labels.
"""

import dataclasses
import re
from typing import Any, ClassVar

from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.formats import files
from research.prm.labelled import LabelledSolution

_KNOWN = "problem", "prefix_steps", "gt_step_labels", "cot"
_BOXED = re.compile(r"\\boxed\{(correct|incorrect)\}")
_SIGNS = {"+": 1, "-": 0}


def decisions(chain: str) -> tuple[tuple[int, int], ...]:
  """Returns a chain's verdicts on steps, and where their words begin."""
  matches = _BOXED.finditer(chain)
  return tuple((int(x[1] == "correct"), x.start(1)) for x in matches)


def verdicts(chain: str) -> tuple[int, ...]:
  """Returns a chain's verdicts on steps, in order: 1 for correct."""
  return tuple(label for label, _ in decisions(chain))


def agrees(solution: LabelledSolution) -> bool:
  """Whether a chain's verdicts are the labels, up to the first wrong step.

  The filter that the published chains passed; chains stop at an error.
  """
  chain_labels = verdicts(solution.critiques[0]) if solution.critiques else ()
  error = solution.first_error
  n = len(solution.steps) if error in (None, -1) else error + 1
  return chain_labels[:n] == solution.labels[:n]


@dataclasses.dataclass(frozen=True)
class ThinkPRM:
  """ThinkPRM's verification chains; `prefix` and `prefix_label` are extra."""

  single: ClassVar[bool] = True

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the record's solution, with its one chain."""
    signs = files.texts(record, "gt_step_labels")
    labels = [
      files.choice(record, f"gt_step_labels[{i}]", sign, _SIGNS)
      for i, sign in enumerate(signs)
    ]
    return [
      LabelledSolution(
        prompt=record.text("problem"),
        steps=files.texts(record, "prefix_steps"),
        labels=tuple(labels),
        critiques=(record.text("cot"),),
        label_source="human",
        segmenter_id="newline",
        extra=files.extra(record, _KNOWN),
      )
    ]

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns the record; a solution needs its chain."""
    if len(solution.critiques) != 1:
      raise UserError(
        f"critiques: found {len(solution.critiques)}, expected one chain"
      )
    return dict(solution.extra) | {
      "problem": solution.prompt,
      "prefix_steps": list(solution.steps),
      "gt_step_labels": files.hard(solution, "-+".__getitem__),
      "cot": solution.critiques[0],
    }
