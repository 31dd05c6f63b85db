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
from research.training.objectives.objective import Batch
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
  """The arguments of a step, as sharded `jax.ShapeDtypeStruct`s.

  Attributes:
    loaded: the model; its transformed parameters are shapes.
    objective: the loss of that model.
    mesh: the experiment's, over the given devices.
    state: a `TrainState`.
    batch: of training.
    key: of the run.
  """

  loaded: Loaded
  objective: Any
  mesh: Mesh
  state: state.TrainState
  batch: Batch
  key: Any

  @property
  def tokens(self) -> int:
    """Tokens of a batch, padding included."""
    return int(np.prod(self.batch["tokens"].shape))


def build(experiment: Experiment, devices: Sequence[Any]) -> AbstractStep:
  """Returns the arguments of a training step of `experiment`.

  Only the first row of the data is made, for the shape of a batch.

  Args:
    experiment: to be trained.
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
    objective=dataclasses.replace(experiment.objective, model=loaded.model),
    mesh=mesh,
    state=jax.tree.map(_at, made, where),
    batch=_batch(experiment, loaded.tokenizer, mesh),
    key=_at(key, sharding.replicated(mesh)),
  )


def lower(experiment: Experiment, abstract: AbstractStep) -> jax.stages.Lowered:
  """Returns the experiment's training step, ready to be compiled.

  Args:
    experiment: to be trained.
    abstract: from `build` of that experiment.
  """
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


def _batch(experiment: Experiment, tokenizer: Any, mesh: Mesh) -> Batch:
  data = experiment.data
  if isinstance(data, RolloutData):
    raise UserError(
      f"data: found {type(data).__name__}, whose batches the policy samples;"
      " expected rows of data.\nPlan the same model with a Pipeline of rows as"
      " long as prompt and answer: a step costs the same."
    )
  row = data.stream(tokenizer)[0]
  whole = experiment.mesh.batch(mesh)
  out = {}
  for name, x in row.items():
    shape = (data.batch_size, *x.shape)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    out[name] = _at(
      jax.ShapeDtypeStruct(shape, dtype),
      global_batch.array_sharding(whole, shape, name),
    )
  return out
