"""A run's working directory: belongs to one experiment configuration."""

import json
import os
import re

import jax

from research.io import folders
from research.io.folders import Folder
from research.training.checkpoints import checkpoint, versions
from research.typing import UserError

LENGTH_LINES = r"(?i)^steps =|\b(TrainConfig|plan|optim\.\w+)\.steps ="
"""Configuration lines that set the length of a run, including its schedule.
Other `steps`, such as Muon's, are part of the experiment."""

LENGTH_AND_MESH_LINES = LENGTH_LINES + (
  r"|^[\w./]+\bmesh = @|^(from|import) .*\bsharding\b|^[\w./]*\bsharding\."
  r"|^(data|fsdp|sequence|ring|ulysses|tensor|expert) ="
)
"""Those, and lines that set a run's mesh of devices: what a run may change when
it is resumed."""

STAGES = "stages.json"
"""In the working directory of a run of stages: their names, in order."""


def stage_names(workdir: Folder) -> list[str]:
  """Returns the names of a run's stages, in order; none if it has none.

  Raises:
    UserError: the note of them is damaged.
  """
  note = workdir / STAGES
  if not note.exists():
    return []
  try:
    names = json.loads(note.read_bytes())["stages"]
    good = all(isinstance(x, str) and re.fullmatch(r"\w+", x) for x in names)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{note}: is no list of stages ({error}).\nRun experiments.train with"
      " its --config again."
    ) from error
  if not good:
    raise UserError(f"{note}: found stages {names}, expected their names")
  return list(names)


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
  if names := stage_names(workdir):
    raise UserError(
      f"{workdir}: this workdir holds a run of the stages {', '.join(names)}.\n"
      f"Choose another workdir; the run of a stage is in {workdir / names[0]}."
    )
  if mark.exists() and has_progress(workdir):
    old = mark.read_bytes().decode("utf-8", errors="replace")
    _same_experiment(mark, old, config, may_differ)
  return workdir


def has_progress(workdir: Folder) -> bool:
  """Whether a run has taken a step or saved a checkpoint here."""
  if checkpoint.has_saved(workdir / "checkpoints"):
    return True
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and b'"train/' in metrics.read_bytes()


def _same_experiment(mark: Folder, old: str, new: str, may_differ: str) -> None:
  def lines(text):
    return [x for x in _statements(text) if not re.search(may_differ, x)]

  old, new = map(without_unused_imports, (old, new))
  if lines(old) == lines(new):
    return
  changes = _changes(_bindings(old), _bindings(new), may_differ)
  # The same bindings, of other modules.
  changes = changes or [
    *(f"-{x}" for x in lines(old) if x not in lines(new)),
    *(f"+{x}" for x in lines(new) if x not in lines(old)),
  ]
  more = len(changes) - checkpoint.MAX_DIFFERENCES
  rest = f"  (and {more} more)" if more > 0 else ""
  raise UserError(
    f"{mark}: this workdir holds another experiment.\n"
    f"{'  '.join(changes[: checkpoint.MAX_DIFFERENCES])}{rest}\n"
    "Choose another workdir, or delete this one. To resume the run that is"
    " there, leave out --config."
  )


def without_unused_imports(text: str) -> str:
  """Returns a configuration without imports that no binding refers to.

  These have no effect: a file may import what only a command line binds, so
  that two equal configurations differ once such an import is added.
  """
  kept, rest = [], re.sub(r"^(from|import)\s.*$", "", text, flags=re.M)
  for line in text.splitlines(keepends=True):
    module = re.match(r"(?:from [\w.]+ )?import ([\w.]+)(?: as (\w+))?", line)
    name = module and (module[2] or module[1])
    bound = re.search(rf"(?<![\w.]){re.escape(name or '')}\.", rest)
    if name in (None, "dynamic_registration") or bound:
      kept.append(line)
  return "".join(kept)


def _statements(text: str) -> list[str]:
  """Returns a configuration's imports and bindings, a line each.

  Values of several lines are joined: as lines of their own they could change
  places, or binding, unnoticed.
  """
  statements: list[str] = []
  inside = False
  for line in text.splitlines():
    bound = re.match(r"[\w./]+ = ", line)
    if line[:1] in ("#", ""):
      inside = False
    elif inside and not bound and not re.match(r"(from|import)\s", line):
      statements[-1] = (
        f"{statements[-1].removesuffix('\\').strip()} {line.strip()}"
      )
    else:
      statements.append(line.strip())
      inside = bound is not None
  return statements


def _bindings(text: str) -> dict[str, str]:
  pairs = (re.match(r"([\w./]+) = (.*)", x) for x in _statements(text))
  return {match[1]: match[2] for match in pairs if match}


def _changes(
  old: dict[str, str], new: dict[str, str], may_differ: str
) -> list[str]:
  """Returns what differs, macros first: what a user sets is one, mostly."""
  out = []
  for name in sorted(old | new, key=lambda x: ("." in x, x)):
    lines = [
      f"{sign}{name} = {values[name]}"
      for sign, values in (("-", old), ("+", new))
      if name in values
    ]
    differs = old.get(name) != new.get(name)
    if differs and not any(re.search(may_differ, x[1:]) for x in lines):
      out.append("  ".join(lines))
  return out
