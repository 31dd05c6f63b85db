"""Compares runs, read from their working directories."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.training.checkpoints import workdir
from research.training.reports import goodput, metrics, plots
from research.training.reports.plot_runs import Curves, series
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run, read from its working directory.

  Attributes:
    name: unique among the runs.
    records: of metrics.jsonl.
    result: of result.json; empty where the run is not finished.
    config: binding -> value, as text; empty without a config.gin.
  """

  name: str
  records: Sequence[Mapping[str, Any]]
  result: Mapping[str, Any]
  config: Mapping[str, str]

  @property
  def totals(self) -> Mapping[str, Any]:
    """The last `Goodput.summary` of the run; empty before the first."""
    written = (r for r in reversed(self.records) if "goodput/step" in r)
    return next(written, {})

  def seconds(self) -> dict[str, float]:
    """Returns bucket -> wall seconds."""
    totals = self.totals
    buckets = goodput.BUCKETS if totals else ()
    return {b: totals.get(f"goodput/{b}") or 0.0 for b in buckets}

  def curves(self) -> Curves:
    return Curves(
      name=self.name,
      records=self.records,
      seconds=self.seconds(),
      fraction=self.totals.get("goodput/fraction"),
    )

  def row(self) -> dict[str, Any]:
    steps, losses = series(self.records, "train/loss")
    _, validation = series(self.records, "validation/loss")
    timed = [r for r in self.records if r.get("train/seconds")]
    spent = sum(r["train/seconds"] for r in timed)
    tokens = sum(r.get("train/tokens") or 0.0 for r in timed)
    peak = self.result.get("peak_memory_bytes")
    return {
      "run": self.name,
      "steps": steps[-1] if steps else 0,
      "train loss": plots.smooth(losses)[-1] if losses else None,
      "validation loss": validation[-1] if validation else None,
      "held-out perplexity": self.result.get("perplexity_after"),
      "tokens/s": tokens / spent if tokens else None,
      "goodput": self.totals.get("goodput/fraction"),
      "slow steps": sum("train/slow_step" in r for r in self.records),
      "lives": self.totals.get("goodput/lives"),
      "minutes": sum(self.seconds().values()) / 60 or None,
      "trainable": self.result.get("trainable_parameters"),
      "peak GiB": None if peak is None else peak / 2**30,
    }


def load(workdirs: Sequence[str]) -> list[Run]:
  """Returns the runs of these directories.

  A sweep's own stands for its units, that of a run of stages for its stages.
  """
  folders: list[pathlib.Path] = []
  for given in workdirs:
    folder = pathlib.Path(given)
    units = [
      place
      for unit in sorted(folder.glob("units/*"))
      for place in _runs(unit)
      if (place / "metrics.jsonl").is_file()
    ]
    folders += units or _runs(folder)
  for folder in folders:
    if not (folder / "metrics.jsonl").is_file():
      raise UserError(
        f"--workdir={folder}: found no metrics.jsonl there, expected the "
        "directory of a run of experiments.train"
      )
  names = _names(folders)
  return [_read(f, name) for f, name in zip(folders, names, strict=True)]


def _runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of a run's stages, or its own if it has none."""
  return [folder / name for name in workdir.stage_names(folder)] or [folder]


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  short = [folder.resolve().name for folder in folders]
  if len(set(short)) == len(short):
    return short
  full = [os.path.relpath(folder) for folder in folders]
  if len(set(full)) < len(full):
    again = next(name for name in full if full.count(name) > 1)
    raise UserError(f"--workdir: {again} is given twice.")
  return full


def _read(folder: pathlib.Path, name: str) -> Run:
  try:
    result = json.loads((folder / "result.json").read_text("utf-8"))
  except FileNotFoundError:
    result = {}
  except ValueError as error:
    raise UserError(f"{folder}/result.json: is no JSON ({error}).") from error
  config = folder / "config.gin"
  text = config.read_text("utf-8", "replace") if config.is_file() else ""
  return Run(
    name=name,
    records=metrics.read_jsonl(folder / "metrics.jsonl"),
    result=result if isinstance(result, dict) else {},
    config=bindings(text),
  )


def bindings(text: str) -> dict[str, str]:
  """Returns binding -> value of an operative configuration, as text.

  Gin writes a long value over several lines, the later ones indented.
  """
  found: dict[str, str] = {}
  name = None
  for line in text.splitlines():
    match = re.fullmatch(r"([\w./]+) = (.*)", line)
    if match:
      name, value = match.groups()
      found[name] = value.rstrip("\\").strip()
    elif name and line[:1] in (" ", "\t", ")", "]", "}"):
      found[name] = f"{found[name]} {line.rstrip('\\').strip()}".strip()
    else:
      name = None
  return found


def differences(runs: Sequence[Run]) -> dict[str, dict[str, str | None]]:
  """Returns binding -> run -> value, where the runs' values differ.

  Runs whose configuration is lost are left out.
  """
  known = [run for run in runs if run.config]
  names = sorted({name for run in known for name in run.config})
  table = {
    name: {run.name: run.config.get(name) for run in known} for name in names
  }
  return {k: v for k, v in table.items() if len(set(v.values())) > 1}


def difference_rows(
  found: Mapping[str, Mapping[str, str | None]], runs: Sequence[Run]
) -> list[dict[str, Any]]:
  """Returns the differences as a table, with more rows than columns."""
  if len(runs) <= len(found):
    return [{"binding": name, **values} for name, values in found.items()]
  return [
    {"run": run.name, **{name: found[name].get(run.name) for name in found}}
    for run in runs
  ]
