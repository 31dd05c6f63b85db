"""A sweep's units on disk: their configurations, commands and results."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import sweeps
from experiments.core import config
from experiments.stages import staged
from experiments.sweeps.launch import Work
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """A unit whose configuration has been built once.

  Attributes:
    unit: its bindings.
    text: its whole configuration, as gin.
    steps: of training.
    work: for a launcher.
  """

  unit: sweeps.Unit
  text: str
  steps: int
  work: Work

  def result(self) -> dict[str, Any] | None:
    """Returns the result of this very configuration, or None."""
    workdir = self.work.workdir
    try:
      mark = (workdir / "config.gin").read_text("utf-8")
      found = json.loads((workdir / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
      return None
    # A run that is being lengthened still has the result of the shorter one.
    done = isinstance(found, dict) and found.get("steps") == self.steps
    return _flat(found) if done and mark == self.text else None


def _flat(found: dict[str, Any]) -> dict[str, Any]:
  flat = {}
  for name, value in found.items():
    inner = value if isinstance(value, dict) else {"": value}
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
    sweep: of the units.
    workdir: of the sweep.
    more: gin bindings for all units; they win over `sweep.fixed`.
    options: flags for all units.

  Raises:
    UserError: a unit's binding is unknown, or of the wrong type, or changes
      nothing; or two units are the same run.
  """
  shared = [*sweeps.bindings(sweep.fixed), *more]
  units = sweep.units()
  given = {line.split("=")[0].strip() for line in more}
  if both := given & {binding for unit in units for binding in unit}:
    raise UserError(f"--set={min(both)}=...: the sweep varies it already.")
  planned: list[Planned] = []
  for unit in units:
    name = sweeps.name(unit)
    try:
      lines = [*shared, *sweeps.bindings(unit)]
      read = config.read(sweep.config, lines)
    except UserError as error:
      raise UserError(f"unit {name}: {error}") from error
    folder = workdir / "units"
    work = Work(
      name=name,
      config=folder / f"{name}.gin",
      workdir=folder / name,
      log=folder / f"{name}.log",
      options=tuple(options),
    )
    steps = staged.final(read.experiment).plan.steps
    planned.append(Planned(unit=unit, text=read.text, steps=steps, work=work))
  _all_different(planned)
  return planned


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


def write(planned: Sequence[Planned]) -> None:
  """Writes the folders and configurations that a launcher needs."""
  for unit in planned:
    path = unit.work.config
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(unit.text, encoding="utf-8")
    except OSError as error:
      raise UserError(
        f"{path}: cannot be written ({error.strerror}).\nExpected a writable"
        " --workdir with free space."
      ) from error
