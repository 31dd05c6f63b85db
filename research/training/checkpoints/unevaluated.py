"""The checkpoint of a run that was asked to end before a step's evaluation.

Evaluations take longer than schedulers wait, and a step's checkpoint carries
its metrics, by which the best is found. So a step that was not evaluated is
saved apart; the run that goes on from it evaluates it first, and then saves it
where it belongs, as if nothing had happened.
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
"""In the working directory; removed once its step is evaluated."""


def save(workdir: Folder, state: TrainState, data: Any = None) -> None:
  """Writes the state's step; arguments as for `Checkpoints.save`."""
  with Checkpoints(workdir / NAME, keep=1, sweep=True) as one:
    one.save(state, data)


def restore(
  workdir: Folder, target: TrainState, data: Any, resumed: int | None
) -> tuple[TrainState, int | None]:
  """Returns the state of a step later than `resumed`, and which step that is.

  `(target, None)` where there is none, or it is damaged.

  Args:
    workdir: of the run.
    target: what to return otherwise; gives shapes and shardings.
    data: the iterator to set to where it stood.
    resumed: the step that the run would go on from without it.
  """
  folder = workdir / NAME
  if not folder.is_dir():
    return target, None
  with Checkpoints(folder, keep=1) as one:
    step = one.latest
    if step is None or step <= (resumed or 0):
      return target, None
    try:
      return one.restore(target, data, step), step
    except UserError as error:
      folders.warn(f"not used: {error}")
      return target, None


def remove(workdir: Folder) -> None:
  """Removes what has been evaluated since."""
  folder = workdir / NAME
  if jax.process_index():
    return
  with folders.writing(folder):
    if folders.is_remote(folder):
      folder.rmtree()
    else:
      shutil.rmtree(folder)
