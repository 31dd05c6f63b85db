"""Ahead-of-time compilation of the training step, with XLA's cost estimate."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research import progress, sharding
from research.training import memory
from research.training.objectives.objective import Batch
from research.training.state import TrainState
from research.training.step import Metrics
from research.typing import PRNGKey, UserError

StateTransform = Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]
"""Applied after a step: `(state, metrics) -> (state, metrics)`.

It is compiled with the step, decides by `state.step` whether to act, and may
consume metrics that are arrays.
"""

Kinds = frozenset[tuple[str, tuple[int, ...], np.dtype]]
"""Name, shape and dtype of each array of a batch."""


def lower_step(
  step: Callable,
  state: TrainState,
  batch: Batch,
  key: PRNGKey | jax.ShapeDtypeStruct,
  state_transforms: Sequence[StateTransform] = (),
) -> jax.stages.Lowered:
  """Lowers the update for the devices of its arguments.

  The update is `(moving, frozen, batch, key) -> (moving, metrics)`, where
  `moving` is the state without its frozen part. `moving` is donated, `frozen`
  is not. Metrics that are still arrays after all transforms are dropped.

  Args:
    state: the state or its shapes. On a mesh, the new state has the same
      sharding, and metrics are replicated.
    state_transforms: applied to the state after each step, in order.

  Raises:
    UserError: a transform changes frozen weights.
  """

  def update(moving, frozen, batch, key):
    full = dataclasses.replace(moving, frozen=frozen)
    state, metrics = step(full, batch, key)
    for transform in state_transforms:
      state, metrics = transform(state, metrics)
      if state.frozen is not frozen:
        raise UserError(
          f"{transform}: changed frozen weights, which step checkpoints do not"
          " contain.\nExpected it to change only weights that `trainable` or"
          " `transformed` matches."
        )
    numbers = {k: v for k, v in metrics.items() if v.ndim == 0}
    return dataclasses.replace(state, frozen=None), numbers

  moving = dataclasses.replace(state, frozen=None)
  program = jax.jit(update, donate_argnums=0, out_shardings=_same(moving))
  return program.lower(moving, state.frozen, batch, key)


def compile_steps(
  step: Callable,
  state: TrainState,
  batches: Sequence[Batch],
  key: PRNGKey | jax.ShapeDtypeStruct,
  state_transforms: Sequence[StateTransform] = (),
) -> tuple[Callable, dict[str, float]]:
  """Returns the compiled update of `lower_step`, and its cost.

  There is a program for each shape of batches, and no other: a batch of
  another shape raises a UserError instead of recompiling silently.

  Args:
    state, state_transforms: as for `lower_step`.
    batches: one of each shape, or their shapes.

  Returns:
    The update, and metrics: seconds of all compilations, the number of
    programs, and the FLOPs and bytes of the one with the most of each.
  """
  programs: dict[Kinds, Callable] = {}
  costs = []
  for batch in batches:
    if _kinds(batch) in programs:
      continue
    begin = time.perf_counter()
    with progress.phase("compiling the step"):
      lowered = lower_step(step, state, batch, key, state_transforms)
      compiled = lowered.compile()
    memory.release()
    seconds = time.perf_counter() - begin
    costs.append({"compile/seconds": seconds, **_cost(compiled)})
    _log(costs[-1], batch, several=len(batches) > 1)
    programs[_kinds(batch)] = compiled

  def run(moving, frozen, batch, key):
    program = programs.get(_kinds(batch))
    if program is None:
      raise UserError(
        f"batch: found {_shapes(batch)},\n{_expected(batches)}.\n"
        "Every batch of a run has one shape, or that of a bucket: pad the"
        " rows, drop a short batch."
      )
    return program(moving, frozen, batch, key)

  return run, _total(costs)


def _log(cost: dict[str, float], batch: Batch, several: bool) -> None:
  numbers = ", ".join(
    f"{v:.3g} {k[8:]}" for k, v in cost.items() if k[8:] != "seconds"
  )
  logging.info(
    "Compiled the step%s in %.1f s: %s",
    f" for {_shapes(batch)}" if several else "",
    cost["compile/seconds"],
    numbers,
  )


def _expected(batches: Sequence[Batch]) -> str:
  shapes = [str(_shapes(batch)) for batch in batches]
  return (
    "expected " + ("" if len(shapes) == 1 else "one of\n") + "\n".join(shapes)
  )


def _total(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the seconds of all programs, and the most of everything else."""
  names = dict.fromkeys(name for cost in costs for name in cost)
  total = {k: max(cost.get(k, 0.0) for cost in costs) for k in names}
  total["compile/seconds"] = sum(cost["compile/seconds"] for cost in costs)
  return total | {"compile/programs": len(costs)}


def _same(moving: TrainState) -> Any:
  """Returns the shardings of the new state and metrics; None without a mesh."""
  where = getattr(moving.step, "sharding", None)
  if not isinstance(where, jax.sharding.NamedSharding):
    return None
  return (
    jax.tree.map(lambda x: x.sharding, moving),
    sharding.replicated(where.mesh),
  )


def _kinds(batch: Batch) -> Kinds:
  return frozenset(
    (path, x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    for path, x in batch.items()
  )


def _shapes(batch: Batch) -> dict[str, str]:
  return {
    path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
    for path, x in sorted(batch.items())
  }


def _cost(compiled: Any) -> dict[str, float]:
  """Returns XLA's cost analysis of a program.

  Loop bodies count once, and custom kernels, such as attention in C++, do not
  count.
  """
  flops = (compiled.cost_analysis() or {}).get("flops")
  usage = compiled.memory_analysis()
  cost = {} if flops is None else {"compile/flops": float(flops)}
  if usage is not None:
    cost["compile/temporary_bytes"] = usage.temp_size_in_bytes
    cost["compile/argument_bytes"] = usage.argument_size_in_bytes
  return cost
