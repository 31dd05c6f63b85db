"""Means of an objective's metrics over held-out batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
from jax.sharding import NamedSharding

from research import sharding as shardings
from research.training import global_batch
from research.training.objectives.objective import Batch, Objective
from research.training.state import TrainState
from research.training.step import EvalStep, make_eval_step
from research.typing import UserError


class Stopped(Exception):
  """An evaluation was left before its end, since the run is to end."""


Evaluations = Mapping[str, Sequence[Batch]]
"""Name, e.g. `validation`, -> batches of one shape."""


def compiled(
  objective: Objective, sharding: NamedSharding | None = None
) -> EvalStep:
  """Returns the jitted evaluation step; its sums are on every device.

  Args:
    objective: what to measure.
    sharding: of batches, or None off a mesh.
  """
  where = None if sharding is None else shardings.replicated(sharding.mesh)
  return jax.jit(make_eval_step(objective), out_shardings=where)


def evaluate_all(
  step: EvalStep,
  state: TrainState,
  evaluations: Evaluations,
  sharding: NamedSharding | None = None,
  leaving: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
  """Returns `name/metric` for each evaluation: means over the weight.

  Args:
    step: from `compiled`.
    state: what to evaluate.
    evaluations: name -> whole batches, in every process.
    sharding: of batches, or None off a mesh.
    leaving: whether to stop, asked before each batch; the same answer in every
      process.

  Raises:
    Stopped: that answer was yes.
  """
  return {
    f"{name}/{metric}": value
    for name, batches in evaluations.items()
    for metric, value in evaluate(
      step, state, _until(leaving, batches), sharding
    ).items()
  }


def _until(
  leaving: Callable[[], bool], batches: Iterable[Batch]
) -> Iterator[Batch]:
  for batch in batches:
    if leaving():
      raise Stopped
    yield batch


def evaluate(
  step: EvalStep,
  state: TrainState,
  batches: Iterable[Batch],
  sharding: NamedSharding | None = None,
) -> dict[str, float]:
  """Returns the metrics' means over all batches' weight, and `weight`.

  Args:
    step: from `compiled`.
    state: what to evaluate.
    batches: of one shape, whole in every process.
    sharding: of batches, or None off a mesh.
  """
  sums = None
  for batch in batches:
    found = step(state, global_batch.place(batch, sharding))
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
