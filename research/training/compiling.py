"""Compiling the step ahead, and what XLA says of its cost."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.training import memory
from research.training.objective import Batch
from research.training.state import TrainState
from research.typing import PRNGKey, UserError


def compile_step(
  step: Callable, state: TrainState, batch: Batch, key: PRNGKey
) -> tuple[Callable, dict[str, float]]:
  """Returns the compiled update and what it costs.

  The update is `(moving, frozen, batch, key) -> (moving, metrics)`, where
  `moving` is the state without its frozen part. It is donated; `frozen` is
  not. It takes one shape of batch: another one is a UserError, never a silent
  recompilation.

  Args:
    step: from `make_train_step`.
    state: or its shapes.
    batch: or its shapes.
    key: or its shape.
  """

  def update(moving, frozen, batch, key):
    full = dataclasses.replace(moving, frozen=frozen)
    state, metrics = step(full, batch, key)
    return dataclasses.replace(state, frozen=None), metrics

  begin = time.perf_counter()
  moving = dataclasses.replace(state, frozen=None)
  program = jax.jit(update, donate_argnums=0)
  compiled = program.lower(moving, state.frozen, batch, key).compile()
  memory.release()
  cost = {"compile/seconds": time.perf_counter() - begin, **_cost(compiled)}
  logging.info(
    "Compiled the step in %.1f s: %s",
    cost["compile/seconds"],
    ", ".join(
      f"{v:.3g} {k[8:]}" for k, v in cost.items() if k[8:] != "seconds"
    ),
  )
  shapes = _shapes(batch)

  def run(moving, frozen, batch, key):
    if _shapes(batch) != shapes:
      raise UserError(
        f"batch: found {_shapes(batch)},\nexpected {shapes}.\n"
        "Every batch of a run has one shape: pad the rows, drop a short batch."
      )
    return compiled(moving, frozen, batch, key)

  return run, cost


def _shapes(batch: Batch) -> dict[str, str]:
  return {
    path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in sorted(batch.items())
  }


def _cost(compiled: Any) -> dict[str, float]:
  """Returns what XLA says of a program; bodies of loops count once."""
  flops = (compiled.cost_analysis() or {}).get("flops")
  usage = compiled.memory_analysis()
  cost = {} if flops is None else {"compile/flops": float(flops)}
  if usage is not None:
    cost["compile/temporary_bytes"] = usage.temp_size_in_bytes
    cost["compile/argument_bytes"] = usage.argument_size_in_bytes
  return cost
