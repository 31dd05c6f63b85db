"""Results of a sweep: progress, tables, a plot."""

import json
import math
import pathlib
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import sweeps
from experiments.core import cli, tables
from experiments.sweeps import live_table
from experiments.sweeps.sweep_units import Planned
from experiments.sweeps.work import PREEMPTED, Events, Work
from research import progress
from research.io import folders
from research.training.preemption import Preempted
from research.training.reports import plot_sweep
from research.typing import UserError

SHOWN = ("tokens_per_s", "seconds")
"""Entries of a unit's result that are printed besides the metric."""

LOG_LINES = 8
"""Lines of a failed unit's log that are printed at the end."""


class Progress(Events):
  """Prints units that end, and keeps results.csv up to date.

  In a terminal, a table below shows the units that run, and how far they are.
  """

  def __init__(
    self,
    sweep: sweeps.Sweep,
    units: Sequence[Planned],
    todo: int,
    workdir: pathlib.Path,
  ):
    self._sweep, self._units = sweep, {u.work.name: u for u in units}
    self._todo, self._done, self._workdir = todo, 0, workdir
    self._statuses: dict[str, int] = {}
    self._failed: set[str] = set()
    self._running: dict[str, tuple[Work, float]] = {}
    self._table = live_table.LiveTable()

  def started(self, work: Work) -> None:
    self._running[work.name] = work, time.monotonic()

  def retried(self, work: Work, status: int) -> None:
    self._running.pop(work.name, None)
    self._failed.add(work.name)
    self._say(
      f"{work.name}: failed with {status}: {last_words(work.log)}; once more,"
      " after the others"
    )

  def ended(self, work: Work, status: int, seconds: float) -> None:
    self._running.pop(work.name, None)
    self._done += 1
    self._statuses[work.name] = status
    head = f"[{self._done}/{self._todo}] {work.name}: "
    result = self._units[work.name].result()
    if result is not None:
      value = tables.cell(result.get(self._sweep.metric))
      text = f"{self._sweep.metric} {value}"
    elif status == PREEMPTED:
      text = "preempted"
    else:
      text = f"failed with {status}: {last_words(work.log)}"
    self._say(f"{head}{text} ({seconds:.0f} s)")
    table = rows(list(self._units.values()), self._statuses)
    tables.write_csv(self._workdir / "results.csv", table)

  def tick(self) -> None:
    """Draws the table of running units, twice a second at most."""
    self._table.draw(self._rows)

  def close(self) -> None:
    self._table.clear()

  def _say(self, text: str) -> None:
    self._table.clear()
    cli.say(text)

  def _rows(self) -> list[dict[str, Any]]:
    now = time.monotonic()
    waiting = self._todo - self._done - len(self._running)
    return [
      {
        "running": f"{name} (again)" if name in self._failed else name,
        "for": progress.duration(now - begin),
        "at": progress_of(work),
      }
      for name, (work, begin) in self._running.items()
    ] + ([{"running": f"{waiting} more units wait"}] if waiting else [])


def progress_of(work: Work) -> str:
  """Returns how far a unit is: its step and loss, or what its log ends with."""
  line = _last_line(work.workdir / "metrics.jsonl")
  try:
    record = json.loads(line)
    loss = record.get("train/loss")
    return f"step {record['step']}" + (f", loss {loss:.4g}" if loss else "")
  except (ValueError, TypeError, KeyError):
    return _last_line(work.log).rpartition("\r")[2]


def _last_line(path: pathlib.Path) -> str:
  """Returns the last whole line of a file that grows; '' without any."""
  try:
    with path.open("rb") as file:
      file.seek(max(0, path.stat().st_size - 4096))
      lines = file.read().decode("utf-8", "replace").split("\n")[:-1]
  except OSError:
    return ""
  return next((line for line in reversed(lines) if line.strip()), "")


def last_words(log: pathlib.Path) -> str:
  """Returns the error that a log ends with, or its last line."""
  try:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
  except OSError:
    return "no log"
  errors = [line for line in lines[-4:] if line.startswith("error: ")]
  return (errors or lines or ["empty log"])[-1].removeprefix("error: ")


def end_of(log: pathlib.Path) -> str:
  """Returns the last lines of a log, under its path, for people to read."""
  try:
    lines = log.read_text("utf-8", "replace").splitlines()
  except OSError as error:
    lines = [f"cannot be read ({error.strerror})"]
  kept = [line.rpartition("\r")[2] for line in lines if line.strip()]
  return "\n".join([f"{log}:", *(f"  {x}" for x in kept[-LOG_LINES:])])


def rows(
  units: Sequence[Planned], statuses: Mapping[str, int]
) -> list[dict[str, Any]]:
  """Returns a row for each unit: bindings, status, and all of its result.

  Args:
    statuses: exit statuses of the units that ran just now.
  """
  table = []
  for unit in units:
    result, name = unit.result(), unit.work.name
    if result is not None:
      status = "done"
    elif statuses.get(name, PREEMPTED) == PREEMPTED:
      status = "missing"
    else:
      status = "failed"
    head = {"unit": name, **unit.unit, "status": status}
    more = {k: v for k, v in (result or {}).items() if k not in head}
    table.append({**head, **more})
  return table


class Group(NamedTuple):
  """Units that differ in their seeds alone.

  Attributes:
    unit: their bindings, without the seed.
    values: the metric of those that have it, in order.
    lost: names of those that have run, and have no finite metric: they failed
      or diverged. A mean over the others would be that of the lucky seeds.
  """

  unit: sweeps.Unit
  values: list[float]
  lost: list[str]


def groups(
  units: Sequence[Planned],
  metric: str,
  seed: str,
  failed: Collection[str] = (),
) -> list[Group]:
  """Returns units by their bindings without the seed.

  Args:
    failed: names of units that ran and have no result.
  """
  found: dict[str, Group] = {}
  for unit in units:
    rest = {k: v for k, v in unit.unit.items() if k != seed}
    group = found.setdefault(sweeps.name(rest), Group(rest, [], []))
    result, name = unit.result(), unit.work.name
    value = (result or {}).get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
      group.values.append(float(value))
    elif result is not None or name in failed:
      group.lost.append(name)
  return list(found.values())


def report(
  sweep: sweeps.Sweep,
  units: Sequence[Planned],
  statuses: Mapping[str, int],
  workdir: pathlib.Path,
  title: str,
) -> dict[str, Any]:
  """Writes and prints the results; returns their summary."""
  table = rows(units, statuses)
  metric = sweep.metric
  _has(metric, table)
  tables.write_csv(workdir / "results.csv", table)
  varied = list(dict.fromkeys(k for unit in units for k in unit.unit))
  shown = [*varied, "status", metric, *SHOWN]
  cli.say("\n" + tables.text([{k: row.get(k) for k in shown} for row in table]))
  failed = [row["unit"] for row in table if row["status"] == "failed"]
  grouped = groups(units, metric, sweep.seed, failed)
  if len(grouped) < len(units):
    cli.say("\n" + tables.text(_means(grouped, metric)))
  if lost := [name for group in grouped for name in group.lost]:
    cli.say(
      f"{len(lost)} of {len(units)} units ran and have no finite {metric}:"
      f" {', '.join(lost[:3])}{', ...' if lost[3:] else ''}.\nTheir settings"
      " have no mean, are not drawn, and are not the best."
    )
  measured = [(g.unit, g.values) for g in grouped if g.values and not g.lost]
  picture = workdir / "results.png"
  axis = sweep.axis or sweeps.axis([g.unit for g in grouped], sweep.seed)
  drawn = [(unit, values) for unit, values in measured if axis in unit]
  if drawn and axis is not None:
    plot_sweep.plot_sweep(drawn, picture, axis=axis, metric=metric, title=title)
  result = {
    "units": len(units),
    "done": sum(row["status"] == "done" for row in table),
    "failed": failed,
    "missing": [r["unit"] for r in table if r["status"] == "missing"],
    "diverged": [name for name in lost if name not in failed],
    "metric": metric,
    "best": _best(measured, sweep),
    "workdir": str(workdir),
  }
  path = workdir / "result.json"
  with folders.writing(path):
    folders.write_text(path, json.dumps(cli.plain(result), indent=2) + "\n")
  return result


def check_complete(result: Mapping[str, Any], units: Sequence[Planned]) -> None:
  """Raises unless every unit is done, and then prints the result as it is.

  Raises:
    Preempted: units are missing, since the sweep was asked to stop.
    UserError: units failed.
  """
  failed, missing = result["failed"], result["missing"]
  if not failed and not missing:
    return
  for unit in [u for u in units if u.work.name in failed]:
    cli.say(end_of(unit.work.log))
  cli.say(json.dumps(cli.plain(result)))
  if not failed:
    raise Preempted(
      f"{len(missing)} of {len(units)} units are not done; the same command"
      " goes on."
    )
  log = next(u.work.log for u in units if u.work.name == failed[0])
  raise UserError(
    f"{len(failed)} of {len(units)} units failed: {', '.join(failed[:3])}"
    f"{', ...' if len(failed) > 3 else ''}.\n"
    f"{log}: {last_words(log)}\n"
    "The same command runs what is missing."
  )


def _has(metric: str, table: Sequence[Mapping[str, Any]]) -> None:
  done = [row for row in table if row["status"] == "done"]
  if done and all(row.get(metric) is None for row in done):
    numbers = [k for k, v in done[0].items() if isinstance(v, int | float)]
    if any(metric in row for row in done):
      raise UserError(
        f"Sweep.metric: {metric!r} is null in all of {len(done)} results.\n"
        "Expected a finite number: every unit has diverged, or measures it on"
        f" nothing. Others are {', '.join(numbers)}."
      )
    raise UserError(
      f"Sweep.metric: no result has {metric!r}.\nExpected one of"
      f" {', '.join(numbers)}."
    )


def _means(grouped: Sequence[Group], metric: str) -> list[dict[str, Any]]:
  """Returns a line for each group: its mean, or how many runs are lost."""
  mean, lines = f"{metric}, mean", []
  for unit, values, lost in grouped:
    lines.append({**unit, **_spread(values, mean)})
    if lost:
      lines[-1] |= {mean: None, "deviation": None, "lost": len(lost)}
  return lines


def _spread(values: Sequence[float], mean: str = "mean") -> dict[str, Any]:
  return {
    "runs": len(values),
    mean: statistics.fmean(values) if values else None,
    "deviation": statistics.stdev(values) if len(values) > 1 else None,
  }


def _best(
  measured: Sequence[tuple[sweeps.Unit, Sequence[float]]], sweep: sweeps.Sweep
) -> dict[str, Any] | None:
  """Returns the bindings with the best mean, and its spread over seeds.

  None where nothing is measured, or all settings have the same mean.
  """
  if not measured:
    return None
  means = {statistics.fmean(values) for _, values in measured}
  if len(measured) > len(means) == 1:
    cli.say(
      f"All {len(measured)} settings have the same {sweep.metric},"
      f" {means.pop():.6g}: none is the best."
    )
    return None
  choose = min if sweep.better == "lower" else max
  unit, values = choose(measured, key=lambda x: statistics.fmean(x[1]))
  return {"bindings": unit, **_spread(values)}
