"""Models that runs of `experiments.train` have left."""

import dataclasses
import pathlib
from collections.abc import Mapping
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
    workdir: of the run; of several stages the last one is meant.
    checkpoint: which one.

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


def saved_steps(value: Any) -> dict[str, int]:
  """Returns the last saved step of each run whose model is part of a value.

  Args:
    value: of dataclasses, lists, tuples and mappings, such as a `SearchRun`;
      one with a field `workdir` loads a run's model.
  """
  if isinstance(value, type):  # which makes judges, say
    parts = ()
  elif dataclasses.is_dataclass(value):
    fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
    if isinstance(workdir := fields.get("workdir"), str):
      folder = pathlib.Path(workdir)  # of one stage, or of several
      saved = (*folder.glob("checkpoints"), *folder.glob("*/checkpoints"))
      steps = [train_eval.last_step(x.parent) for x in saved]
      return {workdir: max(steps)} if steps else {}
    parts = list(fields.values())
  elif isinstance(value, Mapping):
    parts = list(value.values())
  else:
    parts = value if isinstance(value, (list, tuple)) else ()
  return {k: n for part in parts for k, n in saved_steps(part).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """The model that a run has trained, as a policy.

  Attributes:
    workdir: of the run.
    checkpoint: which of its checkpoints.
  """

  workdir: str
  checkpoint: CheckpointChoice = "best"

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model, its weights and its tokenizer."""
    del shardings
    built, params, _ = restore(self.workdir, self.checkpoint)
    return dataclasses.replace(built.loaded, params=params)
