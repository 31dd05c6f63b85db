"""Models that runs of `experiments.train` have left."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from experiments.core import (
  config,
  data_fingerprint,
  device_context,
  train_eval,
)
from experiments.core.experiment import Experiment
from experiments.stages import staged
from research.interop.loaded import Loaded
from research.io.unread import Shardings
from research.typing import Params, UserError

CheckpointChoice = Literal["best", "last"]
"""Of a run's checkpoints."""


def restore(
  workdir: str, checkpoint: CheckpointChoice = "best"
) -> tuple[Any, Params, Experiment]:
  """Returns a run's `BuiltExperiment`, its trained weights, and its settings.

  The run's own configuration builds the model; transforms of `after` are
  applied to its weights.

  Args:
    workdir: working directory; of several stages the last one is meant.

  Raises:
    UserError: there is no run, or it has saved nothing.
  """
  read = config.read_workdir(workdir)
  experiment, folder = staged.open_run(read.experiment, workdir)
  context = device_context.current(experiment.mesh)
  last = train_eval.last_step(folder)
  if not last:
    raise UserError(
      f"{folder}: found no checkpoint, expected a run that has saved one."
    )
  built = experiment.build(context)
  tokenizer = data_fingerprint.restore_tokenizer(
    experiment, built.loaded.tokenizer, folder
  )
  _, state = train_eval.restore_checkpoint(
    experiment, built, folder, None if checkpoint == "best" else last
  )
  params = experiment.finished(state.params)
  return built.with_tokenizer(tokenizer), params, experiment


def workdirs(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  """Yields (field, working directory) of each run whose model is in a value.

  Args:
    value: dataclasses, lists, tuples and mappings, such as a `SearchRun`; a
      dataclass with a field `workdir` loads a run's model.
  """
  if isinstance(value, type):  # which makes judges, say
    parts: dict[Any, Any] = {}
  elif dataclasses.is_dataclass(value):
    parts = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
    if isinstance(workdir := parts.get("workdir"), str):
      yield name, workdir
      return
    name = name or type(value).__name__
  elif isinstance(value, Mapping):
    parts = dict(value)
  else:
    parts = dict(enumerate(value if isinstance(value, (list, tuple)) else ()))
  for key, part in parts.items():
    yield from workdirs(part, f"{name}.{key}")


def saved_steps(value: Any) -> dict[str, int]:
  """Returns the last saved step of each run whose model is part of a value."""
  saved_at = {}
  for _, workdir in workdirs(value):
    folder = pathlib.Path(workdir)  # of one stage, or of several
    saved = (*folder.glob("checkpoints"), *folder.glob("*/checkpoints"))
    if steps := [train_eval.last_step(x.parent) for x in saved]:
      saved_at[workdir] = max(steps)
  return saved_at


def check_workdirs(value: Any) -> None:
  """Raises UserError for the first model in a value without its run."""
  for field, workdir in workdirs(value):
    if not (pathlib.Path(workdir) / "config.gin").is_file():
      macro = {"policy": "POLICY", "verifier": "PRM"}.get(field.split(".")[1])
      raise UserError(
        f"{field}: {workdir}: found no config.gin there, expected the working"
        " directory of a run of experiments.train"
        + (f"; --set={macro}=DIR names it" if macro else "")
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """The model that a run has trained, as a policy."""

  workdir: str
  checkpoint: CheckpointChoice = "best"

  def load(self, shardings: Shardings | None = None) -> Loaded:
    del shardings
    built, params, _ = restore(self.workdir, self.checkpoint)
    return dataclasses.replace(built.loaded, params=params)
