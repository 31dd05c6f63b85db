"""Compiling the step ahead, and what XLA says of its cost."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research import sharding
from research.training import memory
from research.training.objectives.objective import Batch
from research.training.state import TrainState
from research.training.step import Metrics
from research.typing import PRNGKey, UserError

StateTransform = Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]
"""What follows a step: `(state, its metrics) -> (state, metrics)`.

It is compiled with the step, decides by `state.step` when it does anything,
and may use up metrics that are arrays.
"""


def lower_step(
  step: Callable,
  state: TrainState,
  batch: Batch,
  key: PRNGKey | jax.ShapeDtypeStruct,
  rewrites: Sequence[StateTransform] = (),
) -> jax.stages.Lowered:
  """Returns the update, for the devices that its arguments are on.

  It is `(moving, frozen, batch, key) -> (moving, metrics)`, where `moving` is
  the state without its frozen part. It is donated; `frozen` is not. Metrics
  that are still arrays after the rewrites are dropped.

  Args:
    step: from `make_train_step`.
    state: or its shapes. On a mesh, the new state is cut as this one is, and
      the metrics are on every device.
    batch: or its shapes.
    key: or its shape.
    rewrites: of the state, after each step, in order.
  """

  def update(moving, frozen, batch, key):
    full = dataclasses.replace(moving, frozen=frozen)
    state, metrics = step(full, batch, key)
    for rewrite in rewrites:
      state, metrics = rewrite(state, metrics)
      if state.frozen is not frozen:
        raise UserError(
          f"{rewrite}: changed frozen weights, which no checkpoint of a step"
          " holds.\nExpected changes of what `trainable` or `held` matches"
          " alone."
        )
    numbers = {k: v for k, v in metrics.items() if v.ndim == 0}
    return dataclasses.replace(state, frozen=None), numbers

  moving = dataclasses.replace(state, frozen=None)
  program = jax.jit(update, donate_argnums=0, out_shardings=_same(moving))
  return program.lower(moving, state.frozen, batch, key)


def compile_step(
  step: Callable,
  state: TrainState,
  batch: Batch,
  key: PRNGKey | jax.ShapeDtypeStruct,
  rewrites: Sequence[StateTransform] = (),
) -> tuple[Callable, dict[str, float]]:
  """Returns the compiled update of `lower_step` and what it costs.

  It takes one shape of batch: another one is a UserError, never a silent
  recompilation.
  """
  begin = time.perf_counter()
  compiled = lower_step(step, state, batch, key, rewrites).compile()
  memory.release()
  cost = {"compile/seconds": time.perf_counter() - begin, **_cost(compiled)}
  logging.info(
    "Compiled the step in %.1f s: %s",
    cost["compile/seconds"],
    ", ".join(
      f"{v:.3g} {k[8:]}" for k, v in cost.items() if k[8:] != "seconds"
    ),
  )
  wanted, shapes = _kinds(batch), _shapes(batch)

  def run(moving, frozen, batch, key):
    if _kinds(batch) != wanted:
      raise UserError(
        f"batch: found {_shapes(batch)},\nexpected {shapes}.\n"
        "Every batch of a run has one shape: pad the rows, drop a short batch."
      )
    return compiled(moving, frozen, batch, key)

  return run, cost


def _same(moving: TrainState) -> Any:
  """Returns the shardings of a new state, and of metrics; None off a mesh."""
  where = getattr(moving.step, "sharding", None)
  if not isinstance(where, jax.sharding.NamedSharding):
    return None
  return (
    jax.tree.map(lambda x: x.sharding, moving),
    sharding.replicated(where.mesh),
  )


def _kinds(batch: Batch) -> dict[str, tuple[Any, Any]]:
  """Returns what has to be equal in every batch; asked at every step."""
  return {path: (x.shape, x.dtype) for path, x in batch.items()}


def _shapes(batch: Batch) -> dict[str, str]:
  """Returns the same in words."""
  return {
    path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in sorted(batch.items())
  }


def _cost(compiled: Any) -> dict[str, float]:
  """Returns what XLA says of a program.

  Bodies of loops count once, and kernels that are not XLA's, such as attention
  in C++, not at all.
  """
  flops = (compiled.cost_analysis() or {}).get("flops")
  usage = compiled.memory_analysis()
  cost = {} if flops is None else {"compile/flops": float(flops)}
  if usage is not None:
    cost["compile/temporary_bytes"] = usage.temp_size_in_bytes
    cost["compile/argument_bytes"] = usage.argument_size_in_bytes
  return cost
