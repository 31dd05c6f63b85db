"""One table of plans: a model, a method and a pod; if it fits, how fast.

Every cell, an arm, is a run file that is compiled for devices that are not
here. Cells that this machine has no time for are listed as not compiled. Claims
of memory are decided by the compiler's own account, and published rates have to
lie under the bounds.
"""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.core import config
from experiments.core.experiment import Experiment
from experiments.planning import (
  calls,
  plan_decoding,
  plan_sampling,
  plan_search,
  plan_training,
)
from experiments.stages import staged
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.io import folders
from research.planning import chips
from research.typing import UserError

KINDS = ("train", "generate", "fill", "search")
"""What is planned, as the flags of `experiments.plan`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """A line of the table.

  Attributes:
    model: its name.
    method: what is done with it.
    config: run file.
    topology: see `research.planning.chips.topology`.
    set: bindings over the run file's.
    stage: of a run of stages.
    generate, fill, search: rows, see `experiments.plan`; empty for training.
    verifier: run file of a search's verifier.
    scored: solutions that the verifier reads at once.
  """

  model: str
  method: str
  config: str
  topology: str
  set: Sequence[str] = ()
  stage: str | None = None
  generate: str = ""
  fill: str = ""
  search: str = ""
  verifier: str | None = None
  scored: int | None = None

  @property
  def name(self) -> str:
    """The name of its arm."""
    return f"{self.model}, {self.method}, {self.topology}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
  """A number that lies on one side of what a cell says, if a claim holds.

  Attributes:
    claim: in words.
    cell: the name of its arm.
    field: of the row, such as `bytes` or `mfu_bound`.
    least, most: the row's value is within these; None for no limit.
  """

  claim: str
  cell: str
  field: str
  least: float | None = None
  most: float | None = None

  def verdict(self, rows: Rows) -> Verdict:
    """Returns whether it holds; undecided where the cell has no such number.

    It was not compiled, or its program does not fit, which has no times.
    """
    row = rows.get(self.cell, {})
    value = row.get(self.field)
    if value is None:
      why = "does not fit" if row else "not compiled"
      return Verdict(self.claim, f"{self.cell}: {why}", None)
    low = self.least is None or value >= self.least
    high = self.most is None or value <= self.most
    shown = f"{value / 1e9:.1f}e9" if self.field == "bytes" else f"{value:.3g}"
    return Verdict(
      self.claim, f"{self.field} {shown}: {self.cell}", low and high
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTable(protocol.Study):
  """The table; every cell is compiled once, so nothing is random.

  Attributes:
    cells: the table's.
    bounds: claims about cells.
    skipped: regular expression: cells that it finds are not compiled.
  """

  cells: Sequence[Cell]
  bounds: Sequence[Bound] = ()
  skipped: str | None = None

  def __post_init__(self):
    names = self.arms
    protocol.distinct(names, "PlanTable.cells")
    for bound in self.bounds:
      if bound.cell not in names:
        raise UserError(
          f"PlanTable.bounds: {bound.cell!r} is no cell, expected one of"
          f" {'; '.join(names)}"
        )

  @property
  def arms(self) -> list[str]:
    """The names of the cells."""
    return [cell.name for cell in self.cells]

  def settings(self, arm: str) -> str:
    """Returns what the arm's cell says: other cells do not matter."""
    cell = self._cell(arm)
    return f"{protocol.describe(cell)} skipped={self._skips(arm)}"

  def _cell(self, arm: str) -> Cell:
    [cell] = [cell for cell in self.cells if cell.name == arm]
    return cell

  def _skips(self, arm: str) -> bool:
    return bool(self.skipped and re.search(self.skipped, arm))

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns what the compiler says of a cell."""
    del before, shared
    if self._skips(arm):
      return {}
    return compiled(self._cell(arm))

  def table(self, rows: Rows) -> Lines:
    """Returns a line a cell."""
    return [line(cell, rows.get(cell.name, {})) for cell in self.cells]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the cells say of claims."""
    return [claim.verdict(rows) for claim in self.bounds]

  def summary(self, row: Row) -> str:
    """Returns whether it fits."""
    if not row:
      return "not compiled"
    return "fits" if row["fits"] else "does not fit"


def compiled(cell: Cell) -> Row:
  """Returns a cell's bytes, bounds and seconds of compilation.

  Seconds are those on the clock, and the cores' own, which do not depend on
  what else a machine does.

  Raises:
    UserError: an error of its run file, or of its topology.
  """
  begin, cpu = time.perf_counter(), time.process_time()
  topology = chips.topology(cell.topology)
  run = _experiment(cell.config, cell.set, cell.stage)
  if cell.generate:
    rows = calls.rows(cell.generate)
    found = plan_decoding.plan(run, topology, rows)
    row = _of_calls(found, "decode")
  elif cell.fill:
    found = plan_sampling.plan(run, topology, calls.rows(cell.fill, "fill"))
    row = _of_calls(found, "again")
  elif cell.search:
    wanted = plan_search.parse_search(cell.search)
    verifier = None
    if cell.verifier is not None:
      verifier = _experiment(cell.verifier, cell.set)
    found = plan_search.plan(run, verifier, topology, wanted, cell.scored)
    row = _plain(found)
    if row["seconds"] is not None:
      tokens = wanted.rows.count * wanted.copies * wanted.rows.length
      row["tokens_per_s"] = tokens / row["seconds"]
  else:
    row = _plain(plan_training.plan(run, topology))
  return row | {
    "compile_seconds": time.perf_counter() - begin,
    "cpu_seconds": time.process_time() - cpu,
  }


def line(cell: Cell, row: Row) -> dict[str, Any]:
  """Returns a cell's line of the table."""
  out: dict[str, Any] = {
    "model": cell.model,
    "method": cell.method,
    "devices": cell.topology,
  }
  if not row:
    return out | {"fits": "not compiled"}
  total, limit = row["bytes"], row["limit_bytes"]
  return out | {
    "fits": "yes" if row["fits"] else "no",
    "GB a device": None if total is None else total / 1e9,
    "of GB": None if limit is None else limit / 1e9,
    "s at best": row["seconds"],
    "s without overlap": row["seconds_without_overlap"],
    "tokens/s at most": _whole(row["tokens_per_s"]),
    "MFU at most": row["mfu_bound"],
    "s to compile": _whole(row["compile_seconds"]),
    "CPU s to compile": _whole(row.get("cpu_seconds")),
  }


def _whole(x: float | None) -> int | None:
  return None if x is None else round(x)


def _experiment(
  path: str, bindings: Sequence[str], stage: str | None = None
) -> Experiment:
  run = config.read(path, list(bindings)).experiment
  if not isinstance(run, staged.Staged):
    return run
  stages = run.in_workdir(folders.folder(".")).stages
  if stage is None:
    return staged.final(run)
  if stage not in stages:
    raise UserError(
      f"{path}: found no stage {stage!r}, expected one of {', '.join(stages)}"
    )
  return stages[stage]


def _plain(found: Mapping[str, Any]) -> Row:
  names = (
    "fits",
    "limit_bytes",
    "seconds",
    "seconds_without_overlap",
    "tokens_per_s",
    "mfu_bound",
    "devices",
  )
  return {name: found.get(name) for name in names} | {
    "bytes": found.get("total_bytes")
  }


def _of_calls(found: Mapping[str, Any], step: str) -> Row:
  """Returns a row of calls: seconds of the step, bytes of the larger call."""
  made = [x for x in found.values() if isinstance(x, Mapping) and "fits" in x]
  row = _plain(found.get(step, made[-1]))
  totals = [x["total_bytes"] for x in made if "total_bytes" in x]
  return row | {
    "devices": found["devices"],
    "fits": all(x["fits"] for x in made),
    "bytes": max(totals, default=None),
    "tokens_per_s": found.get("tokens_per_s", row["tokens_per_s"]),
  }
