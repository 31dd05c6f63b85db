"""A run of several stages: experiments that follow each other by name.

A run file says which, and binds what only one of them has in its scope, macros
as well; all else holds in every stage:

  staged.Stages.names = ('align', 'tune')
  LEARNING_RATE = 1e-4
  align/LEARNING_RATE = 1e-3
  align/experiment.Experiment.trainable = '^embed'
  tune/experiment.Experiment.trainable = '/trained/'

The model of the first stage is the run's; each later one starts from the
weights of the stage before it (`StageResult`), with an optimizer of its own,
or from a model of its own, of which that result may be a part (an encoder).
Each is a run in `workdir/<stage>`, whose `config.gin` has its bindings alone.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from experiments.core import device_context, train_eval
from experiments.core.experiment import Experiment
from research.interop.loaded import Loaded, Source
from research.io import folders
from research.io.folders import Folder
from research.io.unread import Shardings
from research.training import state
from research.typing import UserError

RESERVED = {"validation", "heldout", "checkpoints", "adapter", "model", "units"}
"""Scopes that run files use for something else, and folders of a run."""


def check_names(names: Sequence[str]) -> None:
  """Raises UserError for no names, or one that is no scope and folder."""
  good = [
    re.fullmatch(r"[A-Za-z]\w*", name) is not None and name not in RESERVED
    for name in names
  ]
  if not names or not all(good) or len(set(names)) < len(names):
    raise UserError(
      f"stages: found {list(names)}, expected different names of letters,"
      f" digits and _, none of {', '.join(sorted(RESERVED))}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
  """The stages of a run file.

  Attributes:
    names: of the stages, in the order of running; scopes of their bindings.
  """

  names: tuple[str, ...]

  def __post_init__(self):
    check_names(self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
  """The model that an earlier stage has trained, after its transforms `after`.

  Attributes:
    stage: its name.
    checkpoint: which of its weights: of the last step, or of the best one.
    experiment: that stage; who opens a run fills it in.
    workdir: of that stage, likewise.
  """

  stage: str
  checkpoint: Literal["last", "best"] = "last"
  experiment: Experiment | None = dataclasses.field(default=None, repr=False)
  workdir: Folder | None = None

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model and its weights, trained ones in float32.

    The weights that the stage started from are made again as it made them; all
    that it trained is its checkpoint's.

    Args:
      shardings: not used: the stage has its own, on the mesh that is set.

    Raises:
      UserError: the stage has not finished.
    """
    del shardings
    experiment, workdir = self._opened()
    context = device_context.current(experiment.mesh)
    last = train_eval.last_step(workdir)
    if last < experiment.plan.steps:
      raise UserError(
        f"{workdir}: is at step {last} of {experiment.plan.steps}, expected a"
        " stage that has finished.\nTrain it first: experiments.train"
        f" --workdir={workdir.parent}"
      )
    built = experiment.build(context)
    number = None if self.checkpoint == "best" else last
    step, trained = train_eval.restore_checkpoint(
      experiment, built, workdir, number
    )
    return dataclasses.replace(
      built.loaded,
      params=experiment.finished(trained.params),
      source={**built.loaded.source, "stage": self.stage, "step": step},
    )

  def load_abstract(self) -> Loaded:
    """Returns the same with shapes in place of weights, which are not read."""
    experiment, _ = self._opened()
    loaded = experiment.load_abstract()

    def trained(params):
      made = state.create(params, experiment.trainable, experiment.optimizer)
      return experiment.finished(made.params)

    return dataclasses.replace(
      loaded, params=jax.eval_shape(trained, loaded.params)
    )

  def _opened(self) -> tuple[Experiment, Any]:
    if self.experiment is None or self.workdir is None:
      raise UserError(
        f"StageResult: stage {self.stage!r} belongs to no run; expected it in a"
        " staged.Staged, or in a stage's working directory"
      )
    return self.experiment, self.workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
  """Experiments that run one after the other.

  Attributes:
    stages: experiments by name, in the order of running. The model of each but
      the first is a `StageResult` of one before it.
    texts: the operative configuration of each, if they were read from one.
  """

  stages: Mapping[str, Experiment]
  texts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_names(list(self.stages))
    before: list[str] = []
    for name, experiment in self.stages.items():
      for result in results_in(experiment.model):
        if result.stage not in before:
          raise UserError(
            f"stage {name!r}: its model is the result of {result.stage!r},"
            f" expected a stage before it, of {before}"
          )
      before.append(name)

  @property
  def last(self) -> str:
    return list(self.stages)[-1]

  def in_workdir(self, workdir: Folder) -> "Staged":
    """Returns the same, with results of stages to be found in `workdir`."""
    opened: dict[str, Experiment] = {}
    for name, experiment in self.stages.items():
      opened[name] = open_results(
        experiment, lambda stage: (opened[stage], workdir / stage)
      )
    return dataclasses.replace(self, stages=opened)


def results_in(source: Any) -> list[StageResult]:
  """Returns the stages' results that a source is, or has as its parts."""
  found: list[StageResult] = []

  def collect(result):
    found.append(result)
    return result

  _with_results(source, collect)
  return found


def open_results(
  experiment: Experiment, find: Callable[[str], tuple[Experiment, Folder]]
) -> Experiment:
  """Returns an experiment whose source knows where stages' results are.

  Args:
    find: name of a stage -> that stage, and its working directory.
  """

  def opened(result):
    stage, workdir = find(result.stage)
    return dataclasses.replace(result, experiment=stage, workdir=workdir)

  source = _with_results(experiment.model, opened)
  if source is experiment.model:
    return experiment
  return dataclasses.replace(experiment, model=source)


def _with_results(
  source: Any, change: Callable[[StageResult], StageResult]
) -> Any:
  """Returns a source with the results in it, and in its parts, changed."""
  if isinstance(source, StageResult):
    return change(source)
  if not dataclasses.is_dataclass(source) or not isinstance(source, Source):
    return source
  parts = {}
  for field in dataclasses.fields(source):
    part = getattr(source, field.name)
    new = _with_results(part, change)
    if new is not part:
      parts[field.name] = new
  return dataclasses.replace(source, **parts) if parts else source


def final(experiment: Experiment | Staged) -> Experiment:
  """Returns the last stage, or the experiment that has no stages."""
  if isinstance(experiment, Staged):
    return experiment.stages[experiment.last]
  return experiment


def open_run(
  experiment: Experiment | Staged, workdir: str | None
) -> tuple[Experiment, Folder | None]:
  """Returns what to evaluate of a run, and its working directory.

  Args:
    experiment: of a run file or a working directory.
    workdir: the run's, whose last stage is meant; None for the model that the
      run starts from, which is the first stage's.
  """
  if not isinstance(experiment, Staged):
    return experiment, None if workdir is None else folders.folder(workdir)
  if workdir is None:
    return next(iter(experiment.stages.values())), None
  folder = folders.folder(workdir)
  name = experiment.last
  return experiment.in_workdir(folder).stages[name], folder / name
