"""A sweep's units on disk: their configurations, commands and results."""

import collections
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import sweeps
from experiments.core import config, train_eval
from experiments.stages.staged import Staged
from experiments.studies import protocol
from experiments.sweeps.work import Work
from research.io import folders
from research.typing import UserError

ROOTS = {
  "train": "experiments.core.experiment:Experiment",
  "evaluate": "experiments.core.experiment:Experiment",
  "search": "experiments.searching.search_run:SearchRun",
  "study": "experiments.studies.protocol:Run",
}
"""What the configuration of each command builds: module:class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """A unit whose configuration has been built once.

  Attributes:
    unit: its bindings.
    text: its whole configuration, as gin.
    work: for a launcher.
    run: what the configuration builds.
  """

  unit: sweeps.Unit
  text: str
  work: Work
  run: Any = None

  def result(self) -> dict[str, Any] | None:
    """Returns the result of this very configuration, or None."""
    if not self.is_written():
      return None
    try:
      found = json.loads(self.work.result.read_text("utf-8"))
    except (OSError, ValueError):
      return None
    return _flat(found)

  def is_written(self) -> bool:
    try:
      return self.work.config.read_text("utf-8") == self.text
    except (OSError, ValueError):
      return False


def _flat(found: dict[str, Any]) -> dict[str, Any]:
  flat = {}
  for name, value in found.items():
    inner = value if isinstance(value, dict) else {"": value}
    if name == "verdicts":  # a study's; how many of them hold: maybe none
      counts = collections.Counter(x["verdict"] for x in value)
      inner = {state: counts[state] for state in protocol.STATES.values()}
    flat |= {f"{name}/{k}" if k else name: v for k, v in inner.items()}
  return flat


def plan(
  sweep: sweeps.Sweep,
  workdir: pathlib.Path,
  more: Sequence[str] = (),
  options: Sequence[str] = (),
) -> list[Planned]:
  """Returns the units of a sweep; builds each configuration, runs nothing.

  Args:
    more: gin bindings for all units; they win over `sweep.fixed`.

  Raises:
    UserError: a unit's binding is unknown, or of the wrong type, or changes
      nothing; or two units are the same run.
  """
  units = sweep.units()
  given = {line.split("=")[0].strip() for line in more}
  fixed = {name: x for name, x in sweep.fixed.items() if name not in given}
  shared = [*sweeps.bindings(fixed), *more]
  if both := given & {binding for unit in units for binding in unit}:
    raise UserError(f"--set={min(both)}=...: the sweep varies it already.")
  planned: list[Planned] = []
  for unit in units:
    name = sweeps.name(unit)
    try:
      lines = [*shared, *sweeps.bindings(unit)]
      read = config.read(sweep.config, lines, root=root(sweep.command))
    except UserError as error:
      raise UserError(f"unit {name}: {error}") from error
    folder = workdir / "units"
    work = Work(
      name=name,
      config=folder / f"{name}.gin",
      workdir=folder / name,
      log=folder / f"{name}.log",
      program=sweep.command,
      options=(*sweep.options, *options),
    )
    planned.append(
      Planned(unit=unit, text=read.text, work=work, run=read.experiment)
    )
  _all_different(planned)
  return planned


def root(command: str) -> type:
  """Returns the class that a command's configuration builds."""
  module, _, name = ROOTS[command].partition(":")
  return getattr(importlib.import_module(module), name)


def _all_different(planned: Sequence[Planned]) -> None:
  seen: dict[str, Planned] = {}
  for unit in planned:
    for key in (unit.text, unit.work.name):
      other = seen.setdefault(key, unit)
      if other is not unit:
        raise UserError(
          f"sweep: {other.unit} and {unit.unit} are the same run.\n"
          "Expected units that differ, in their names too; leave one out."
        )


def check_steps(planned: Sequence[Planned]) -> None:
  """Raises UserError if a unit has trained for more steps than it is to.

  A run that has finished is left as it is: its result would be that of more.
  """
  for unit in planned:
    if unit.work.program != "train":
      continue
    stages = unit.run.stages if isinstance(unit.run, Staged) else {"": unit.run}
    for stage, experiment in stages.items():
      folder = unit.work.workdir / stage
      last, steps = train_eval.last_step(folder), experiment.plan.steps
      if last > steps:
        raise UserError(
          f"{folder}: is at step {last}, expected at most {steps}, which the"
          " sweep sets.\nSet at least as many steps, or choose another"
          " --workdir."
        )


def write(planned: Sequence[Planned]) -> None:
  """Writes what a launcher needs; removes results of other configurations."""
  for unit in planned:
    path = unit.work.config
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      unit.work.result.unlink(missing_ok=True)
      folders.write_text(path, unit.text)
    except OSError as error:
      raise UserError(
        f"{path}: cannot be written ({error.strerror}).\nExpected a writable"
        " --workdir with free space."
      ) from error
