"""Plans training: compiles an experiment's step ahead of time, and its cost.

No flags, no gin; `experiments.plan` is the command.
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax

from experiments.core import cli
from experiments.core.experiment import Experiment
from experiments.planning import abstract_step, calls, towers
from research import progress, sharding, tree, weights
from research.lora.diagnosis import memory
from research.nn import flops
from research.optim.low_rank.compressing import Compressing
from research.optim.low_rank.layerwise import Layerwise
from research.planning import forecast, text
from research.planning.chips import Topology
from research.training import step
from research.training.objectives.objective import PER_ROW, NextToken

_SHOWN = frozenset({"tokens"}) | PER_ROW
"""Arrays of a batch that tell its bucket."""


def plan(
  experiment: Experiment,
  topology: Topology,
  hlo: str | os.PathLike | None = None,
  quiet: bool = False,
) -> dict[str, Any]:
  """Returns the cost of a step of `experiment` on `topology`, and prints it.

  Raises:
    UserError: an error of a run before its first step.
  """
  begin = time.perf_counter()
  say = (lambda text: None) if quiet else cli.say
  abstract = largest_bucket(
    experiment, abstract_step.build(experiment, topology.devices)
  )
  found = _before_compiling(experiment, abstract, topology)
  say(_table(experiment, abstract))
  say(_summary(found))
  if found["towers"]:
    say(towers.describe(found["towers"]))
  by_arithmetic = arithmetic(experiment, abstract)
  if by_arithmetic is not None:
    found["predicted_bytes"] = by_arithmetic.total
    say(f"by arithmetic: {by_arithmetic}")
  try:
    with progress.phase(f"compiling for {topology.name}"):
      with topology.lowering():
        lowered = abstract_step.lower(experiment, abstract)
      compiled = topology.compile(lowered)
  except jax.errors.JaxRuntimeError as error:
    return found | calls.refused(error)
  found["seconds_to_plan"] = time.perf_counter() - begin
  if hlo is not None:
    pathlib.Path(hlo).write_text(compiled.as_text(), "utf-8")
  cost = forecast.forecast(compiled, abstract.mesh, topology)
  found |= text.as_json(cost, found["model_flops"], abstract.tokens)
  say(text.describe(cost, found, topology.notes))
  return found


def largest_bucket(
  experiment: Experiment, abstract: abstract_step.AbstractStep
) -> abstract_step.AbstractStep:
  """Returns the step of the bucket with the most FLOPs."""
  if len(abstract.batches) == 1:
    return abstract
  each = [
    dataclasses.replace(abstract, bucket=i)
    for i in range(len(abstract.batches))
  ]
  found = [model_flops(x, experiment) for x in each]
  largest = max(range(len(each)), key=found.__getitem__)
  for i, (x, count) in enumerate(zip(each, found, strict=True)):
    shapes = {k: list(v.shape) for k, v in x.batch.items() if k in _SHOWN}
    planned = ", which is planned" if i == largest else ""
    cli.say(f"a batch of {shapes}: {count:.3g} FLOPs{planned}")
  return each[largest]


def arithmetic(
  experiment: Experiment, abstract: abstract_step.AbstractStep
) -> memory.Memory | None:
  """Returns the memory of a step by arithmetic, kind by kind.

  None where no formula is known: on several devices, for other losses than that
  of the next token, or where layers are updated during the backward pass.
  """
  tx = experiment.optimizer
  simple = isinstance(abstract.objective, NextToken)
  if abstract.mesh.size > 1 or not simple or isinstance(tx, Layerwise):
    return None
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (x.shape[0] // experiment.plan.accumulate, *x.shape[1:]), x.dtype
    ),
    abstract.batch,
  )
  found = memory.step_memory(
    abstract.objective, abstract.state, batch, abstract.key
  )
  if experiment.plan.accumulate == 1 or isinstance(tx, Compressing):
    return found
  # Beside a microbatch's gradients their sums, in float32.
  sums = 4 * tree.count(abstract.state.trainable)
  return dataclasses.replace(found, gradients=found.gradients + sums)


def model_flops(
  abstract: abstract_step.AbstractStep, experiment: Experiment
) -> float:
  """Returns the FLOPs that a step needs, of all devices together.

  Those of its matrix products, forward and backward, where only trainable
  weights have gradients and no layer is recomputed. (Attention's scores are, by
  flash attention's own algorithm.)
  """
  model = abstract.loaded.model.clone(remat="none")
  objective = dataclasses.replace(abstract.objective, model=model)
  update = step.make_train_step(objective, experiment.optimizer)
  return flops.count_flops(update, abstract.state, abstract.batch, abstract.key)


def _before_compiling(
  experiment: Experiment,
  abstract: abstract_step.AbstractStep,
  topology: Topology,
) -> dict[str, Any]:
  """Returns the entries of the result that need no compilation."""
  arguments = (abstract.state, abstract.batch)
  where = jax.tree.map(lambda x: x.sharding, arguments)
  return {
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": abstract.mesh.size,
    "topology_devices": len(topology.devices),
    "mesh": {k: v for k, v in abstract.mesh.shape.items() if v > 1},
    "total_parameters": weights.count(abstract.state.params),
    "trainable_parameters": weights.count(abstract.state.trainable),
    "tokens": abstract.tokens,
    "predicted_argument_bytes": sharding.bytes_per_device(arguments, where),
    "model_flops": model_flops(abstract, experiment),
    "towers": towers.shares(abstract),
  }


def _table(experiment: Experiment, abstract: abstract_step.AbstractStep) -> str:
  params = abstract.state.params
  where = jax.tree.map(lambda x: x.sharding, params)
  counts = sharding.head_counts(abstract.loaded.model)
  whole = experiment.mesh.undivided(params, abstract.mesh, counts)
  return "\n".join(
    [
      tree.describe(params, experiment.trainable, where),
      *(f"not sharded: the mesh does not divide {x}" for x in whole),
    ]
  )


def _summary(found: dict[str, Any]) -> str:
  mesh = ", ".join(f"{k} {v}" for k, v in found["mesh"].items()) or "one device"
  spare = found["topology_devices"] - found["devices"]
  unused = f", {spare} more unused" if spare else ""
  return (
    f"{found['topology']}: {found['devices']} x {found['chip']}, mesh {mesh}"
    f"{unused}\n"
    f"{found['trainable_parameters']:,} of {found['total_parameters']:,}"
    f" parameters are trained on {found['tokens']:,} tokens a step,"
    f" {found['model_flops']:.3g} FLOPs"
  )
