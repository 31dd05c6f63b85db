"""Means of an objective's metrics over held-out batches."""

from collections.abc import Iterable, Mapping, Sequence

import jax

from research.training.objective import Batch
from research.training.state import TrainState
from research.training.step import EvalStep
from research.typing import UserError

Evaluations = Mapping[str, Sequence[Batch]]
"""Name, e.g. `validation`, -> batches of one shape."""


def evaluate_all(
  step: EvalStep, state: TrainState, evaluations: Evaluations
) -> dict[str, float]:
  """Returns `name/metric` for each evaluation: means over the weight."""
  return {
    f"{name}/{metric}": value
    for name, batches in evaluations.items()
    for metric, value in evaluate(step, state, batches).items()
  }


def evaluate(
  step: EvalStep, state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
  """Returns the metrics' means over all batches' weight, and `weight`.

  Args:
    step: from `make_eval_step`, jitted.
    state: what to evaluate.
    batches: of one shape.
  """
  sums = None
  for batch in batches:
    found = step(state, batch)
    # Added on the device: nothing waits until the last batch is queued.
    sums = found if sums is None else jax.tree.map(jax.numpy.add, sums, found)
  total = {k: float(v) for k, v in jax.device_get(sums or {}).items()}
  weight = total.pop("weight", 0.0)
  if not weight:
    raise UserError(
      "evaluation: no targets. Expected at least one batch with some weight;\n"
      "check the evaluation's source and split."
    )
  return {**{k: v / weight for k, v in total.items()}, "weight": weight}
