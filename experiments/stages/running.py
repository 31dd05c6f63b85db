"""Runs an experiment, or the stages of a run one after the other."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from experiments.core import (
  artifacts,
  cli,
  data_fingerprint,
  runtime,
  train_eval,
)
from experiments.core.experiment import Experiment
from experiments.stages.staged import Staged
from research.io import folders
from research.io.folders import Folder
from research.training.checkpoints import run_lock
from research.training.checkpoints import workdir as workdirs
from research.typing import UserError


def claim(
  run: Experiment | Staged,
  text: str,
  workdir: str | os.PathLike,
  may_differ: str = workdirs.LENGTH_LINES,
  stack: contextlib.ExitStack | None = None,
) -> Folder:
  """Creates the working directory and assigns it to a run.

  That of stages has `config.gin`, `stages.json`, and a folder for each stage,
  which is claimed as a run's is (`workdir.claim_workdir`). Nothing is written
  for an experiment that has finished.

  Args:
    text: the operative configuration; of all stages, if there are any.
    may_differ: regular expression of lines that may differ.
    stack: keeps the directory locked (`run_lock`) from before anything is
      written; None unlocks it at the end.

  Raises:
    UserError: it holds a run without stages, a stage that has started has other
      settings now, or one would go on from whose result another has started; or
      another process trains there.
  """
  if stack is None:
    with contextlib.ExitStack() as own:
      return claim(run, text, workdir, may_differ, own)
  if isinstance(run, Experiment):
    folder = workdirs.check_workdir(workdir, text, may_differ)
    if train_eval.finished_result(run, folder) is None:
      stack.enter_context(run_lock.locked(folder))
      workdirs.claim_workdir(workdir, text, may_differ)
    return folder
  folder = folders.folder(workdir)
  if workdirs.has_progress(folder):
    raise UserError(
      f"{folder}: this workdir holds a run without stages, expected one of the"
      f" stages {', '.join(run.stages)}.\nChoose another workdir."
    )
  for name, own in run.texts.items():
    workdirs.check_workdir(folder / name, own, may_differ)
  left = [
    name
    for name, experiment in run.stages.items()
    if train_eval.finished_result(experiment, folder / name) is None
  ]
  _check_order(run, folder)
  if not left:
    return folder
  _check_finished(run, folder, left)
  stack.enter_context(run_lock.locked(folder))
  for name in left:
    workdirs.claim_workdir(folder / name, run.texts[name], may_differ)
  note = json.dumps({"stages": list(run.stages)}) + "\n"
  artifacts.write_text(folder / "config.gin", text)
  artifacts.write_text(folder / workdirs.STAGES, note)
  return folder


def _check_order(run: Staged, folder: Folder) -> None:
  """Raises UserError if a stage would go on though a later one has started."""
  names = list(run.stages)
  for i, name in enumerate(names):
    steps = run.stages[name].plan.steps
    last = train_eval.last_step(folder / name)
    later = [x for x in names[i + 1 :] if workdirs.has_progress(folder / x)]
    if later and last < steps:
      raise UserError(
        f"{folder / name}: stage {name!r} is at step {last} of {steps}, but"
        f" stage {later[0]!r} has started from its result.\nExpected as many"
        " steps as it had; choose another workdir, or delete"
        f" {' and '.join(str(folder / x) for x in later)}."
      )


def _check_finished(run: Staged, folder: Folder, left: list[str]) -> None:
  """Raises UserError if a stage would start from one that trained for longer.

  A stage that has finished is left as it is: its result is that of more steps.
  """
  names = list(run.stages)
  for i, name in enumerate(names):
    last, steps = train_eval.last_step(folder / name), run.stages[name].plan
    later = [x for x in names[i + 1 :] if x in left]
    if name not in left and later and last > steps.steps:
      raise UserError(
        f"{folder / name}: stage {name!r} has finished at step {last}, expected"
        f" {steps.steps}:\nstage {later[0]!r} would start from its result. Set"
        " as many steps as it has, or choose another workdir."
      )


def train(
  run: Experiment | Staged,
  workdir: Folder,
  writers: Sequence[Any] = (),
  started_at: float | None = None,
) -> dict[str, Any]:
  """Trains a run, or goes on with it; returns its result.

  That of stages is the last one's, with the seconds of all, and `stages`: the
  result of each. A stage that has finished is left as it is.

  Args:
    started_at: when the work on it began, see `train_eval.train`.

  Raises:
    Preempted: the run was asked to end, and is saved; see `train_eval.train`.
  """
  if isinstance(run, Experiment):
    return train_eval.train(run, workdir, writers, started_at)
  results: dict[str, dict[str, Any]] = {}
  runtime.first_process_first(lambda: _check_later_files(run, workdir))
  for name, experiment in run.in_workdir(workdir).stages.items():
    cli.log(f"--- stage {name} ({len(results) + 1} of {len(run.stages)})")
    place = workdir / name
    with folders.writing(place):
      place.mkdir(parents=True, exist_ok=True)
    results[name] = train_eval.train(experiment, place, writers, started_at)
    started_at = time.time()
  result = {
    **results[run.last],
    "seconds": sum(each["seconds"] for each in results.values()),
    "workdir": str(workdir),
    "stages": results,
  }
  text = json.dumps(cli.plain(result), indent=2) + "\n"
  path = workdir / "result.json"
  if not path.exists() or path.read_text("utf-8") != text:
    artifacts.write_text(path, text)
  return result


def _check_later_files(run: Staged, workdir: Folder) -> None:
  """Checks the data of later stages before the first one trains for hours."""
  for name, experiment in list(run.stages.items())[1:]:
    if train_eval.finished_result(experiment, workdir / name) is None:
      data_fingerprint.check_files(experiment)
