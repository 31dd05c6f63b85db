"""A run's working directory: belongs to one experiment configuration."""

import difflib
import os
import re

import jax

from research import moved
from research.io import folders
from research.io.folders import Folder
from research.training.checkpoints import checkpoint, versions
from research.typing import UserError

LENGTH_LINES = r"(?i)^steps =|\b(plan|optim\.\w+)\.steps ="
"""Configuration lines that set the length of a run, including its schedule.
Other `steps`, such as Muon's, are part of the experiment."""


def claim_workdir(
  workdir: str | os.PathLike, config: str, may_differ: str = LENGTH_LINES
) -> Folder:
  """Creates the workdir and assigns it to this experiment.

  Writes the operative configuration to `config.gin`. An existing one must be
  equal, except for lines that match `may_differ`: a run with more steps is the
  same experiment. A run that has not taken a step yet may be replaced by
  another one. Different versions of code and libraries only cause a warning,
  see `versions`. With several processes, the first one writes.

  Args:
    workdir: local, or remote such as `gs://bucket/run`.
    config: the operative configuration.
    may_differ: regular expression of lines that may differ.

  Raises:
    UserError: it belongs to another experiment, or cannot be written.
  """
  workdir = check_workdir(workdir, config, may_differ)
  mark = workdir / "config.gin"
  with folders.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    # Atomic: a full disk must not destroy an existing config.gin.
    if jax.process_index() == 0:
      folders.write_text(mark, config)
    versions.record(workdir)
  return workdir


def check_workdir(
  workdir: str | os.PathLike, config: str, may_differ: str = LENGTH_LINES
) -> Folder:
  """Returns the workdir if this experiment may use it; writes nothing.

  Arguments and errors are those of `claim_workdir`.
  """
  workdir = folders.folder(workdir)
  mark = workdir / "config.gin"
  if mark.exists() and has_progress(workdir):
    old = mark.read_bytes().decode("utf-8", errors="replace")
    _same_experiment(mark, old, config, may_differ)
  return workdir


def has_progress(workdir: Folder) -> bool:
  """Whether a run has taken a step or saved a checkpoint here."""
  if any(p.name[0].isdigit() for p in (workdir / "checkpoints").glob("*")):
    return True
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and b'"train/' in metrics.read_bytes()


def _same_experiment(mark: Folder, old: str, new: str, may_differ: str) -> None:
  def lines(text):
    kept = (line.strip() for line in text.splitlines())
    return [x for x in kept if x and not re.search(may_differ, x)]

  if sorted(lines(moved.current(old))) == sorted(lines(new)):
    return  # renamed modules only change the order of imports

  changes = [
    line
    for line in difflib.unified_diff(lines(old), lines(new), n=0, lineterm="")
    if line[:1] in "+-" and line[:3] not in ("+++", "---")
  ]
  if changes:
    more = len(changes) - checkpoint.MAX_DIFFERENCES
    rest = f"  (and {more} more)" if more > 0 else ""
    raise UserError(
      f"{mark}: this workdir holds another experiment.\n"
      f"{'  '.join(changes[: checkpoint.MAX_DIFFERENCES])}{rest}\n"
      "Choose another workdir, or delete this one."
    )
