"""Planning an experiment: compile its step ahead, and say what it costs.

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
from experiments.planning import shapes
from research import sharding, tree, weights
from research.lora.diagnosis import memory
from research.optim.low_rank.layerwise import Layerwise
from research.planning import flops, forecast, text
from research.planning.chips import Topology
from research.training import step
from research.training.objectives.objective import NextToken


def plan(
  experiment: Experiment,
  topology: Topology,
  hlo: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Returns what a step of `experiment` costs on `topology`, and says it.

  Args:
    experiment: what would be trained.
    topology: what on.
    hlo: file for the compiled program's text, or None.

  Raises:
    UserError: what a run would complain of before its first step.
  """
  begin = time.perf_counter()
  taken = shapes.shapes(experiment, topology.devices)
  found = _given(experiment, taken, topology)
  cli.say(_table(experiment, taken))
  cli.say(_head(found))
  by_arithmetic = arithmetic(experiment, taken)
  if by_arithmetic is not None:
    found["predicted_bytes"] = by_arithmetic.total
    cli.say(f"by arithmetic: {by_arithmetic}")
  try:
    compiled = shapes.lower(experiment, taken).compile()
  except jax.errors.JaxRuntimeError as error:
    return found | _refused(error)
  found["seconds_to_plan"] = time.perf_counter() - begin
  if hlo is not None:
    pathlib.Path(hlo).write_text(compiled.as_text(), "utf-8")
  cost = forecast.forecast(compiled, taken.mesh, topology)
  found |= text.as_json(cost, found["model_flops"], taken.tokens)
  cli.say(text.describe(cost, found))
  return found


def arithmetic(
  experiment: Experiment, taken: shapes.Shapes
) -> memory.Memory | None:
  """Returns what a step holds in memory by arithmetic, kind by kind.

  None where it does not know: on several devices, of other losses than that of
  the next token, or where layers move while the backward pass runs.
  """
  tx = experiment.optimizer
  simple = isinstance(taken.objective, NextToken)
  if taken.mesh.size > 1 or not simple or isinstance(tx, Layerwise):
    return None
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (x.shape[0] // experiment.plan.accumulate, *x.shape[1:]), x.dtype
    ),
    taken.batch,
  )
  return memory.step_memory(taken.objective, taken.state, batch, taken.key)


def model_flops(taken: shapes.Shapes, experiment: Experiment) -> float:
  """Returns the FLOPs that a step needs, of all devices together.

  Those of its matrix products, forward and backward, where only what is
  learned has a gradient and no layer is computed again. (Attention's scores
  are, by flash attention's own algorithm.)
  """
  model = taken.loaded.model.clone(remat="none")
  objective = dataclasses.replace(taken.objective, model=model)
  update = step.make_train_step(objective, experiment.optimizer)
  return flops.count_flops(update, taken.state, taken.batch, taken.key)


def _given(
  experiment: Experiment, taken: shapes.Shapes, topology: Topology
) -> dict[str, Any]:
  """Returns what is known before anything is compiled."""
  arguments = (taken.state, taken.batch)
  where = jax.tree.map(lambda x: x.sharding, arguments)
  return {
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": taken.mesh.size,
    "topology_devices": len(topology.devices),
    "mesh": {k: v for k, v in taken.mesh.shape.items() if v > 1},
    "total_parameters": weights.count(taken.state.params),
    "trainable_parameters": weights.count(taken.state.trainable),
    "tokens": taken.tokens,
    "predicted_argument_bytes": sharding.bytes_per_device(arguments, where),
    "model_flops": model_flops(taken, experiment),
  }


def _table(experiment: Experiment, taken: shapes.Shapes) -> str:
  params = taken.state.params
  where = jax.tree.map(lambda x: x.sharding, params)
  counts = sharding.head_counts(taken.loaded.model)
  uncut = experiment.mesh.undivided(params, taken.mesh, counts)
  return "\n".join(
    [
      tree.describe(params, experiment.trainable, where),
      *(f"not cut, since the mesh does not divide it: {x}" for x in uncut),
    ]
  )


def _head(found: dict[str, Any]) -> str:
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


def _refused(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
  """Returns that a program does not fit, if that is what the compiler says."""
  message = str(error)
  if "RESOURCE_EXHAUSTED" not in message:
    raise error
  found = text.parse_out_of_memory(message)
  cli.say(text.describe_out_of_memory(found))
  return found
