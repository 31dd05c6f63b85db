"""A reward model's scores of labelled solutions, and what they are worth."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from research.prm import rows
from research.prm.labelled import LabelledSolution
from research.prm.scores.report import StepReport, evaluate_steps
from research.typing import Params, UserError


def score_solutions(
  model: Any,
  params: Params,
  tokenizer: Any,
  solutions: Sequence[LabelledSolution],
  separator: str = "",
  batch_size: int = 256,
) -> list[list[float]]:
  """Returns the score of each step of solutions, read whole.

  Args:
    model: a `RewardModel` or `GenerativeReward`.
    params: its parameters.
    tokenizer: of the model.
    solutions: in steps.
    separator: as for `rows.encode`.
    batch_size: solutions of a program. All batches have one shape, whose
      length and number of steps are powers of two: calls share programs.
  """
  encoded = [rows.encode(one, tokenizer, separator) for one in solutions]
  length = _power_of_two(max((len(x.tokens) for x in encoded), default=1))
  most = _power_of_two(max((len(x.ends) for x in encoded), default=1))
  tokens = np.zeros((len(encoded), length), np.int32)
  ends = np.full((len(encoded), most), -1, np.int32)
  for i, (ids, own) in enumerate(encoded):
    tokens[i, : len(ids)], ends[i, : len(own)] = ids, own
  found: list[list[float]] = []
  for start in range(0, len(encoded), batch_size):
    part = slice(start, start + batch_size)
    fill = ((0, max(0, start + batch_size - len(encoded))), (0, 0))
    scores = model.scores(
      params,
      np.pad(tokens[part], fill),
      np.pad(ends[part], fill, constant_values=-1),
    )
    for one, row in zip(encoded[part], np.asarray(scores), strict=False):
      found.append(row[: len(one.ends)].tolist())
  return found


def _power_of_two(n: int) -> int:
  """Returns the least power of two that is at least n."""
  return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEvaluation:
  """How well a reward model judges labelled solutions: ProcessBench's way.

  `Experiment.step_report` of a reward model.

  Attributes:
    data: the solutions, of problems that it has not learned; their own labels
      are the truth, whatever `data.labels` says.
    threshold: below it a step is called wrong; fix it before the test.
  """

  data: rows.LabelledRows
  threshold: float | int = 0.5

  def __call__(self, loaded: Any) -> StepReport:
    """Returns the report of a loaded reward model.

    Raises:
      UserError: the model gives no scores of steps.
    """
    model = loaded.model
    if not hasattr(model, "scores"):
      raise UserError(
        f"StepEvaluation: found a {type(model).__name__}, expected a reward"
        " model: interop.rewards.WithHead makes one of a language model."
      )
    solutions = self.data.solutions()
    scores = score_solutions(
      model,
      jax.device_put(loaded.params),
      loaded.tokenizer,
      solutions,
      self.data.separator,
      self.data.batch_size,
    )
    return evaluate_steps(solutions, scores, self.threshold)
