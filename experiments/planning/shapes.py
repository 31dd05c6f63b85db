"""An experiment as shapes: nothing is read, nothing computed.

The functions that make a run's weights, state and step, applied to shapes
alone, so that a model of any size can be looked at from any machine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.core.experiment import Experiment, Source
from research import sharding
from research.interop.loaded import Loaded
from research.training import aot, global_batch, state, step
from research.training.objectives.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
  """What a step takes, as `jax.ShapeDtypeStruct`s that say where they are.

  Attributes:
    loaded: the model; its parameters are shapes.
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
    """Places of tokens in a batch."""
    return int(np.prod(self.batch["tokens"].shape))


def shapes(experiment: Experiment, devices: Sequence[Any]) -> Shapes:
  """Returns what a step of `experiment` takes on such devices.

  Only the data's first row is made, since its shape is the batch's.

  Args:
    experiment: what would be trained.
    devices: JAX's; they need not be here.

  Raises:
    UserError: the mesh does not fit the devices, or anything that a run would
      complain of before its first step.
  """
  mesh = experiment.mesh.mesh(devices)
  loaded = _loaded(experiment.model)
  key, params = jax.eval_shape(jax.random.key, experiment.seed), loaded.params
  for transform in experiment.transforms_of(loaded):
    params = jax.eval_shape(transform, params, key)

  def create(params):
    return state.create(
      params,
      experiment.trainable,
      experiment.optimizer,
      held=experiment.held,
    )

  with jax.set_mesh(mesh):
    made = jax.eval_shape(create, params)
  where = experiment.mesh.shardings(made, mesh, sharding.counts(loaded.model))
  return Shapes(
    loaded=loaded,
    objective=dataclasses.replace(experiment.objective, model=loaded.model),
    mesh=mesh,
    state=jax.tree.map(_at, made, where),
    batch=_batch(experiment, loaded.tokenizer, mesh),
    key=_at(key, sharding.replicated(mesh)),
  )


def lower(experiment: Experiment, taken: Shapes) -> jax.stages.Lowered:
  """Returns the experiment's training step, ready to be compiled.

  Args:
    experiment: what would be trained.
    taken: from `shapes` of that experiment.
  """
  plan = experiment.plan
  update = step.make_train_step(
    taken.objective, experiment.optimizer, plan.accumulate, plan.average
  )
  with jax.set_mesh(taken.mesh):
    return aot.lower_step(
      update, taken.state, taken.batch, taken.key, experiment.rewrites
    )


def _at(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _loaded(source: Source) -> Loaded:
  """Returns what a source loads, with shapes in place of weights."""
  if hasattr(source, "shapes"):
    return source.shapes()
  found: list[Loaded] = []

  def params():
    found.append(source.load())
    return found[-1].params

  made = jax.eval_shape(params)
  return dataclasses.replace(found[-1], params=made)


def _batch(experiment: Experiment, tokenizer: Any, mesh: Mesh) -> Batch:
  data = experiment.data
  row = data.stream(tokenizer)[0]
  whole = experiment.mesh.batch(mesh)
  out = {}
  for name, x in row.items():
    shape = (data.batch_size, *x.shape)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    out[name] = _at(
      jax.ShapeDtypeStruct(shape, dtype), global_batch.fitted(whole, shape)
    )
  return out
