"""Evaluation: means of an objective's metrics over held-out batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
from jax.sharding import NamedSharding

from research import progress
from research import sharding as shardings
from research.training import global_batch
from research.training.objectives.objective import Batch, Objective
from research.training.state import TrainState
from research.training.step import EvalStep, make_eval_step
from research.typing import UserError


class Stopped(Exception):
  """An evaluation was interrupted because the run has to stop."""


Evaluations = Mapping[str, Sequence[Batch]]
"""Name, e.g. `validation`, -> batches of one shape."""


def compiled(
  objective: Objective, sharding: NamedSharding | None = None
) -> EvalStep:
  """Returns the jitted evaluation step; its sums are replicated."""
  where = None if sharding is None else shardings.replicated(sharding.mesh)
  return jax.jit(make_eval_step(objective), out_shardings=where)


def evaluate_all(
  step: EvalStep,
  state: TrainState,
  evaluations: Evaluations,
  sharding: NamedSharding | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
  """Returns `{"name/metric": mean}` over all evaluations.

  Args:
    evaluations: name -> whole batches, the same in every process.
    should_stop: called before each batch; must return the same in every
      process.

  Raises:
    Stopped: `should_stop` returned True.
  """
  return {
    f"{name}/{metric}": value
    for name, batches in evaluations.items()
    for metric, value in evaluate(
      step, state, _until(should_stop, batches), sharding
    ).items()
  }


def _until(
  should_stop: Callable[[], bool], batches: Iterable[Batch]
) -> Iterator[Batch]:
  for batch in batches:
    if should_stop():
      raise Stopped
    yield batch


def evaluate(
  step: EvalStep,
  state: TrainState,
  batches: Iterable[Batch],
  sharding: NamedSharding | None = None,
) -> dict[str, float]:
  """Returns the weighted means of the metrics, and the total `weight`.

  Args:
    batches: whole batches of one shape, the same in every process.

  Raises:
    UserError: the total weight is zero.
  """
  sums = None
  for batch in progress.track(batches, "evaluating batches"):
    batch_sums = step(state, global_batch.to_global(batch, sharding))
    # Summed on the device, so that batches are dispatched without waiting.
    sums = (
      batch_sums
      if sums is None
      else jax.tree.map(jax.numpy.add, sums, batch_sums)
    )
  total = {k: float(v) for k, v in jax.device_get(sums or {}).items()}
  weight = total.pop("weight", 0.0)
  if not weight:
    raise UserError(
      "evaluation: no targets. Expected at least one batch with some weight;\n"
      "check the evaluation's source and split."
    )
  return {**{k: v / weight for k, v in total.items()}, "weight": weight}
