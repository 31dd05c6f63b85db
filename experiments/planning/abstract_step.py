"""A training step by its shapes: nothing is read, nothing is computed.

The functions that make a run's weights, state and step are applied to shapes
alone, so that a model of any size can be planned on any machine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.core.experiment import Experiment, RolloutData
from research import sharding
from research.interop.loaded import Loaded
from research.training import aot, global_batch, state, step
from research.training.objectives.objective import Batch, with_model
from research.typing import UserError
from research.vlm.buckets import BucketedQuestions


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
  """The arguments of a step, as sharded `jax.ShapeDtypeStruct`s.

  Attributes:
    loaded: the model; its transformed parameters are shapes.
    objective: the loss of that model.
    batches: of training, one for each bucket.
    bucket: the batch that the step is planned for, by its number.
  """

  loaded: Loaded
  objective: Any
  mesh: Mesh
  state: state.TrainState
  batches: tuple[Batch, ...]
  key: Any
  bucket: int = 0

  @property
  def batch(self) -> Batch:
    """The batch of the bucket."""
    return self.batches[self.bucket]

  @property
  def tokens(self) -> int:
    """Tokens of a batch, padding included."""
    return int(np.prod(self.batch["tokens"].shape))


def build(experiment: Experiment, devices: Sequence[Any]) -> AbstractStep:
  """Returns the arguments of a training step of `experiment`.

  Only the first row of the data, or of each bucket, is made, for its shape.

  Args:
    devices: JAX's; this machine need not have them.

  Raises:
    UserError: the mesh does not fit the devices, or an error of a run before
      its first step.
  """
  mesh = experiment.mesh.mesh(devices)
  key = jax.eval_shape(jax.random.key, experiment.seed)
  loaded = experiment.load_abstract()

  def create(params):
    return state.create(
      params,
      experiment.trainable,
      experiment.optimizer,
      transformed=experiment.transformed,
    )

  with jax.set_mesh(mesh):
    made = jax.eval_shape(create, loaded.params)
  where = experiment.mesh.shardings(
    made, mesh, sharding.head_counts(loaded.model)
  )
  return AbstractStep(
    loaded=loaded,
    objective=with_model(experiment.objective, loaded.model),
    mesh=mesh,
    state=jax.tree.map(_at, made, where),
    batches=_batches(experiment, loaded.tokenizer, mesh),
    key=_at(key, sharding.replicated(mesh)),
  )


def lower(experiment: Experiment, abstract: AbstractStep) -> jax.stages.Lowered:
  """Returns the experiment's training step, ready to be compiled."""
  plan = experiment.plan
  update = step.make_train_step(
    abstract.objective, experiment.optimizer, plan.accumulate, plan.average
  )
  with jax.set_mesh(abstract.mesh):
    return aot.lower_step(
      update,
      abstract.state,
      abstract.batch,
      abstract.key,
      experiment.state_transforms,
    )


def _at(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _batches(
  experiment: Experiment, tokenizer: Any, mesh: Mesh
) -> tuple[Batch, ...]:
  """Returns the shapes of batches, one for each bucket."""
  data, whole = experiment.data, experiment.mesh.batch(mesh)
  if isinstance(data, RolloutData):
    raise UserError(
      f"data: found {type(data).__name__}, whose batches the policy samples;"
      " expected rows of data.\nPlan the same model with a Pipeline of rows as"
      " long as prompt and answer: a step costs the same."
    )
  if isinstance(data, BucketedQuestions):
    shapes = data.training(tokenizer).shapes
  else:
    row = data.stream(tokenizer)[0]
    shapes = (
      {
        name: jax.ShapeDtypeStruct((data.batch_size, *x.shape), x.dtype)
        for name, x in row.items()
      },
    )
  return tuple(global_batch.abstract(batch, whole) for batch in shapes)
