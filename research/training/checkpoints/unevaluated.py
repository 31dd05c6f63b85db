"""Checkpoint of a run that was preempted before evaluating a step.

Evaluations take longer than schedulers wait, and a step's checkpoint includes
its metrics, which determine the best one. So a step that was not evaluated is
saved separately. The resumed run evaluates it first and then saves it as a
regular checkpoint.
"""

import shutil
from typing import Any

import jax

from research.io import folders
from research.io.folders import Folder
from research.training.checkpoints.checkpoint import Checkpoints
from research.training.state import TrainState
from research.typing import UserError

NAME = "unevaluated"
"""Folder in the working directory; removed once its step is evaluated."""


def save(workdir: Folder, state: TrainState, data: Any = None) -> None:
  """Saves the state; arguments as for `Checkpoints.save`."""
  remove(workdir)  # a damaged one that was not used: Orbax replaces no step
  with Checkpoints(workdir / NAME, keep=1, sweep=True) as checkpoints:
    checkpoints.save(state, data)


def restore(
  workdir: Folder, target: TrainState, data: Any, resumed: int | None
) -> tuple[TrainState, int | None]:
  """Restores the unevaluated state if it is later than step `resumed`.

  Returns:
    `(state, step)`, or `(target, None)` if there is none or it is damaged.
  """
  folder = workdir / NAME
  if not folder.is_dir():
    return target, None
  with Checkpoints(folder, keep=1) as checkpoints:
    step = checkpoints.latest
    if step is None or step <= (resumed or 0):
      return target, None
    try:
      return checkpoints.restore(target, data, step), step
    except UserError as error:
      folders.warn(f"not used: {error}")
      return target, None


def remove(workdir: Folder) -> None:
  """Removes the separate checkpoint, if there is one."""
  folder = workdir / NAME
  if jax.process_index() or not folder.is_dir():
    return
  with folders.writing(folder):
    if folders.is_remote(folder):
      folder.rmtree()
    else:
      shutil.rmtree(folder)
