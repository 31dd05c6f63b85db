"""A model in few bits, in many ways: what is lost, and where.

A `Table` is a model, a text that it did not see, and rows: ways to keep it. A
row's number of bits is what its packed matrices take, everything counted. Each
row is a file of its own, and is measured once.
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from experiments.core import cli
from experiments.core.experiment import NeedsModel, Source
from experiments.studies import claims
from research.quant.algorithms.calibrate import Calibration
from research.quant.reports import compare, report_errors
from research.typing import UserError

BANDS = ((4.25, 4.5), (3.25, 3.5))
"""Bits a weight within which rows compete, both ends included."""

Measured = Mapping[str, Mapping[str, Any]]
"""Name of a row -> what is known of it; plain values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One way to keep the model.

  Attributes:
    name: of the row.
    transforms: of the weights, in order, as in `experiment.Experiment`; errors
      by matrix are those of the last one.
    group: what it belongs to in pictures.
    errors: whether errors by matrix are measured: the last transform leaves
      each matrix in its place and its inputs alone.
    seed: of the transforms' random numbers.
  """

  name: str
  transforms: Sequence[Any] = ()
  group: str = "rounding"
  errors: bool = True
  seed: int = 0

  @property
  def calibrated_on(self) -> int | None:
    """Returns the tokens that its transforms read, where they say so."""
    read = [getattr(t, "calibration", None) for t in self.transforms]
    return sum(r.windows * r.length for r in read if r is not None) or None


@runtime_checkable
class Task(Protocol):
  """Questions whose answers are known."""

  name: str

  def right(self, loaded: Any) -> list[bool]:
    """Returns which questions a model answers as it should."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Rows beside each other.

  Attributes:
    model: what all rows start from.
    rows: by families.
    text: windows that are read; the model and its calibration have not.
    verdicts: rows by name -> claims, what was found, and whether they hold.
    probed: windows that errors by matrix are measured on.
    tasks: with answers, that rows are asked, by name.
  """

  model: Source
  rows: Sequence[Sequence[Row]]
  text: Calibration
  verdicts: Sequence[Callable[[Measured], list[Any]]] = ()
  probed: int = 1
  tasks: Sequence[Task] = ()

  def __post_init__(self):
    names = [row.name for row in self.flat]
    for name in names:
      if names.count(name) > 1:
        raise UserError(f"Table.rows: two are called {name!r}.")

  @property
  def flat(self) -> list[Row]:
    """All rows of all families."""
    return [row for family in self.rows for row in family]


def measured(
  table: Table, folder: pathlib.Path, wanted: re.Pattern[str] = claims.ALL
) -> dict[str, dict[str, Any]]:
  """Returns all rows, from the folder or measured now, in the table's order.

  Args:
    table: what is measured.
    folder: keeps rows; one that was made from other transforms is refused.
    wanted: finds the rows that are looked at.
  """
  kept = claims.Kept(folder / "rows")
  chosen = [row for row in table.flat if wanted.search(row.name)]
  todo = [row for row in chosen if not _kept(kept, table, row)]
  if todo:
    loaded = table.model.load()
    windows = table.text.read(loaded.tokenizer)
    base = compare.base_outputs(
      loaded.model, loaded.params, windows.tokens, table.text.batch
    )
    for row in todo:
      found = one(table, row, loaded, base) | _key(table, row)
      kept.keep(row.name, found)
      cli.say(_said(row.name, found))
  return {row.name: kept[row.name] for row in chosen}


def _key(table: Table, row: Row) -> dict[str, str]:
  """Returns what tells a row from others of its name."""
  key = {"made": f"{row.transforms}", "of": f"{table.model} {table.text}"}
  if table.tasks:
    key["asked"] = f"{table.tasks}"
  # A function's address is another in each process.
  return {name: re.sub(r" at 0x[0-9a-f]+", "", x) for name, x in key.items()}


def _kept(kept: claims.Kept, table: Table, row: Row) -> bool:
  if row.name not in kept:
    return False
  found, want = kept[row.name], _key(table, row)
  if any(found.get(k) != v for k, v in want.items()):
    raise UserError(
      f"{kept.path(row.name)}: was measured with another configuration.\n"
      "Use another --workdir, or remove that file."
    )
  return "failed" not in found


def one(table: Table, row: Row, loaded: Any, base: compare.BaseOutputs) -> dict:
  """Returns what is known of a row, as plain values.

  What its format cannot hold is a row that says so.
  """
  start = time.perf_counter()
  out: dict[str, Any] = {"row": row.name, "group": row.group}
  out["calibrated_on"] = row.calibrated_on
  try:
    before, params = _transformed(row, loaded)
  except UserError as error:
    seconds = time.perf_counter() - start
    return out | {"failed": str(error), "seconds": seconds}
  jax.block_until_ready(params)
  out["seconds_to_pack"] = time.perf_counter() - start
  out |= dataclasses.asdict(report_errors.sizes(params))
  out |= dataclasses.asdict(compare.compare(base, loaded.model, params))
  if table.tasks:
    now = dataclasses.replace(loaded, params=params)
    out["right"] = {task.name: task.right(now) for task in table.tasks}
  if row.errors and out["packed_weights"]:
    tokens = base.tokens[: table.probed]
    found = report_errors.errors(loaded.model, before, params, tokens)
    out |= {"matrices": found, **overall(found)}
  return out | {"seconds": time.perf_counter() - start}


def _transformed(row: Row, loaded: Any) -> tuple[Any, Any]:
  """Returns the weights before and after the last transform."""
  before = params = loaded.params
  key = jax.random.key(row.seed)
  for i, transform in enumerate(row.transforms):
    if isinstance(transform, NeedsModel):
      transform = transform.with_model(loaded)
    before, params = params, transform(params, jax.random.fold_in(key, i))
  return before, params


def overall(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """Returns the median and the worst of what `report_errors` found."""
  output = {address: row["output"] for address, row in found.items()}
  worst = max(output, key=output.get)
  return {
    "output_error": float(np.median(list(output.values()))),
    "weight_error": float(np.median([r["weight"] for r in found.values()])),
    "worst_error": output[worst],
    "worst": worst,
  }


def _said(name: str, row: Mapping[str, Any]) -> str:
  if "failed" in row:
    return f"{name}: {row['failed']}"
  return (
    f"{name}: {row['bits_per_weight']:.3f} bits, perplexity"
    f" {row['perplexity']:.3f} (base {row['base_perplexity']:.3f}), KL"
    f" {row['kl']:.4f} ± {row['kl_se']:.4f}, same top {row['same_top']:.1%}"
    f" ({row['seconds']:.0f} s)"
  )


def band(bits: float | None) -> tuple[float, float] | None:
  """Returns the band that a number of bits, to a hundredth, lies in."""
  if bits is None:
    return None
  found = [b for b in BANDS if b[0] <= round(bits, 2) <= b[1]]
  return found[0] if found else None


def table(rows: Measured) -> list[dict[str, Any]]:
  """Returns a line a row, fewest bits first; bands are marked."""
  good = [row for row in rows.values() if "failed" not in row]
  if not good:
    return []
  lines = [
    {
      "row": "base",
      "perplexity": good[0]["base_perplexity"],
      "accuracy %": 100 * good[0]["base_accuracy"],
    }
  ]
  for row in sorted(good, key=lambda r: -(r["bits_per_weight"] or 99)):
    within = band(row["bits_per_weight"])
    lines.append(
      {
        "row": row["row"],
        "bits": row["bits_per_weight"],
        "band": within and f"{within[0]}-{within[1]}",
        "perplexity": row["perplexity"],
        "KL": row["kl"],
        "± SE": row["kl_se"],
        "KL 99.9%": row["kl_999"],
        "same top %": 100 * row["same_top"],
        "rms Δp %": 100 * row["rms_delta_p"],
        "accuracy %": 100 * row["accuracy"],
        "packed MB": row["packed_bytes"] / 1e6,
        "whole MB": row["nbytes"] / 1e6,
        "output error": row.get("output_error"),
        "worst": row.get("worst_error"),
        "where": row.get("worst"),
      }
    )
  return lines
