"""Checkpoints of a run: what moved, and where the data stood.

Each step holds `state` (step, trainable, optimizer state, moving average) and
`data` (the iterator's position). Frozen weights are not part of a step: they
are recorded once a run, see `base`.

The only file that imports orbax.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from research import tree
from research.training.state import TrainState
from research.typing import UserError

_preserve = ocp.training.preservation_policies
_decide = ocp.training.save_decision_policies

_DISK = re.compile(
  "No space left on device|Disk quota exceeded|Read-only file system"
  "|Permission denied|File too large"
)

SHOWN = 4
"""How many differences an error lists before it counts the rest."""


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Kept are the latest `keep`, and the best by the metric `best`.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int = 2,
    best: str = "validation/loss",
    better: Literal["lower", "higher"] = "lower",
    sweep: bool = False,
  ):
    """Opens `folder`, and makes it if need be.

    Args:
      folder: of the run's checkpoints.
      keep: how many of the latest to keep.
      best: the metric that decides which is best.
      better: which way.
      sweep: remove what a crash left half written; only for the one process
        that writes, since it would remove another's checkpoint in the making.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._sign = 1.0 if better == "lower" else -1.0
    self._best = best
    with writing(self.folder):
      self._steps = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=_decide.FixedIntervalPolicy(1),
        preservation_policy=_preserve.AnyPreservationPolicy(
          [
            _preserve.LatestN(keep),
            _preserve.BestN(
              get_metric_fn=lambda m: -m["cost"],
              n=1,
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
        cleanup_tmp_directories=sweep,
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    # A failed save fails again on closing; the first error says more.
    again = contextlib.suppress(*([Exception] if error else []))
    with _quiet(), again:
      self._steps.close()

  @property
  def steps(self) -> list[int]:
    """The steps that exist, in order."""
    return [c.step for c in self._steps.checkpoints]

  @property
  def latest(self) -> int | None:
    """The last step, or None."""
    return self.steps[-1] if self.steps else None

  @property
  def best(self) -> tuple[int, float] | None:
    """The best step and its metric, or None where none was evaluated."""
    costs = [
      (c.metrics["cost"], -c.step)
      for c in self._steps.checkpoints
      if c.metrics and math.isfinite(c.metrics["cost"])
    ]
    if not costs:
      return None
    cost, step = min(costs)
    return -step, self._sign * cost

  def save(
    self,
    state: TrainState,
    data: Any = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Writes the state's step, and waits: its buffers are about to be donated.

    Args:
      state: what to save; its frozen part is left out.
      data: the very iterator that was consumed, if it can be checkpointed.
      metrics: results at this step; the one named by `best` decides.
    """
    step = int(state.step)
    parts = {"state": _moving(state)}
    if data is not None:
      parts["data"] = data
    cost = self._sign * (metrics or {}).get(self._best, math.nan)
    with writing(self.folder):
      self._steps.save_checkpointables(
        step,
        parts,
        # A checkpoint without a finite metric is never the best.
        metrics={"cost": cost} if math.isfinite(cost) else None,
      )

  def restore(
    self, target: TrainState, data: Any = None, step: int | None = None
  ) -> TrainState:
    """Returns the state of `step` (default: the last), and moves `data` there.

    Args:
      target: a state with the structure, shapes, types and shardings to get;
        its frozen part is passed on.
      data: the iterator to set to where it stood.
      step: which one.

    Raises:
      UserError: no such step, or what it holds differs from `target`.
    """
    step = self.latest if step is None else step
    if step is None or step not in self.steps:
      raise UserError(
        f"{self.folder}: no checkpoint of step {step}; found {self.steps}."
      )
    wanted = _moving(target)
    parts: dict[str, Any] = {"state": jax.tree.map(_abstract, wanted)}
    if data is not None:
      parts["data"] = data
    with _quiet():
      found = self._steps.metadata(step).metadata
      _compare(self.folder / str(step), found, wanted)
      state = self._steps.load_checkpointables(step, parts)["state"]
    return TrainState(frozen=target.frozen, **state)


@contextlib.contextmanager
def writing(where: pathlib.Path):
  """Turns what a full or read-only disk raises into a UserError."""
  try:
    with _quiet():
      yield
  except UserError:
    raise
  except Exception as error:
    # Tensorstore raises ValueError with the system's words inside.
    if not isinstance(error, OSError) and not _DISK.search(str(error)):
      raise
    reason = getattr(error, "strerror", None) or _DISK.search(str(error))[0]
    raise UserError(
      f"{getattr(error, 'filename', None) or where}: cannot be written"
      f" ({reason}).\nExpected a writable folder with free space; a run can"
      " resume from its last checkpoint."
    ) from error


@contextlib.contextmanager
def _quiet():
  """Keeps Orbax from telling how it works, and each error once a thread.

  What is wrong is raised; nothing is lost.
  """
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


def _moving(state: TrainState) -> dict[str, Any]:
  moving = {
    "step": state.step,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "ema": state.ema,
  }
  return moving


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=getattr(x, "sharding", None)
  )


def _compare(where: pathlib.Path, found: Any, wanted: Any) -> None:
  """Raises a UserError that lists the paths in which two trees differ."""

  def kinds(tree_):
    return {
      path: f"{np.dtype(x.dtype).name}{list(x.shape)}"
      for path, x in tree.flatten_paths(tree_)
    }

  have, want = kinds(found), kinds(wanted)
  differences = [
    f"{path}: found {have.get(path, 'nothing')},"
    f" expected {want.get(path, 'nothing')}"
    for path in sorted(have.keys() | want.keys())
    if have.get(path) != want.get(path)
  ]
  if differences:
    more = len(differences) - SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    raise UserError(
      f"{where}: does not fit this model or optimizer.\n"
      f"{'; '.join(differences[:SHOWN])}{rest}\n"
      "Use the configuration that wrote it, or another workdir."
    )


def save_tree(path: os.PathLike, arrays: Any) -> None:
  """Writes a tree of arrays, whole or not at all; replaces what is there."""
  ocp.save(path, arrays, overwrite=True)


def load_tree(path: os.PathLike, target: Any) -> Any:
  """Returns the tree that `save_tree` wrote.

  Args:
    path: where it is.
    target: a tree with its structure, shapes, types and shardings.

  Raises:
    UserError: what it holds differs from `target`.
  """
  with _quiet():
    _compare(pathlib.Path(path), ocp.metadata(path).metadata, target)
    return ocp.load(path, jax.tree.map(_abstract, target))
