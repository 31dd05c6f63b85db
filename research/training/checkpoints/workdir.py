"""A run's working directory: whose it is, and what it was made with."""

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
"""Lines that say how long a run is, its schedule included; there are other
`steps`, such as Muon's, which are part of what it is."""


def claim_workdir(
  workdir: str | os.PathLike, config: str, may_differ: str = LENGTH_LINES
) -> Folder:
  """Returns the workdir, made and marked as this experiment's.

  The mark is `config.gin`, the operative configuration. One that is there must
  be equal, but for lines in which `may_differ` is found: more steps are the
  same experiment. Before its first step a run holds nothing yet, and another
  may take its place. Other versions of code and libraries are only warned of,
  see `versions`. Of several processes, the first one writes.

  Args:
    workdir: local, or remote such as `gs://bucket/run`.
    config: the operative configuration.
    may_differ: regular expression of the lines that need not be equal.

  Raises:
    UserError: it holds another experiment, or cannot be written.
  """
  workdir = check_workdir(workdir, config, may_differ)
  mark = workdir / "config.gin"
  with folders.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    # In one move: a full disk must not cost the mark that is there.
    if jax.process_index() == 0:
      folders.write_text(mark, config)
    versions.record(workdir)
  return workdir


def check_workdir(
  workdir: str | os.PathLike, config: str, may_differ: str = LENGTH_LINES
) -> Folder:
  """Returns the workdir if it is this experiment's to take; writes nothing.

  Args and errors are those of `claim_workdir`.
  """
  workdir = folders.folder(workdir)
  mark = workdir / "config.gin"
  if mark.exists() and has_progress(workdir):
    old = mark.read_bytes().decode("utf-8", errors="replace")
    _same_experiment(mark, old, config, may_differ)
  return workdir


def has_progress(workdir: Folder) -> bool:
  """Whether a run took a step here, or saved one, or found it damaged."""
  if any(p.name[0].isdigit() for p in (workdir / "checkpoints").glob("*")):
    return True
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and b'"train/' in metrics.read_bytes()


def _same_experiment(mark: Folder, old: str, new: str, may_differ: str) -> None:
  def lines(text):
    kept = (line.strip() for line in text.splitlines())
    return [x for x in kept if x and not re.search(may_differ, x)]

  if sorted(lines(moved.current(old))) == sorted(lines(new)):
    return  # modules that moved stand elsewhere among the imports

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
