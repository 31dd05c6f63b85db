"""Tables of runs: on the screen, and as CSV."""

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.io import folders
from research.tables import aligned

Rows = Sequence[Mapping[str, Any]]
"""Column -> value; a row need not have every column."""


def columns(rows: Rows) -> list[str]:
  """Returns every column of any row, in the order of first appearance."""
  return list(dict.fromkeys(name for row in rows for name in row))


def text(rows: Rows) -> str:
  """Returns rows under their columns' names, numbers to the right."""
  names = columns(rows)
  cells = [[cell(row.get(name)) for name in names] for row in rows]
  right = [
    i
    for i, name in enumerate(names)
    if all(isinstance(row.get(name), int | float | None) for row in rows)
  ]
  widths = (max(map(len, column)) for column in zip(names, *cells, strict=True))
  rule = ["-" * width for width in widths]
  return "\n".join(aligned([names, rule, *cells], right))


def cell(value: Any) -> str:
  """Returns a value for people: four digits, thousands apart, `-` for None."""
  if value is None:
    return "-"
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int) or (abs(value) >= 1e4 and abs(value) < 1e15):
    return f"{value:,.0f}"
  return f"{value:.4g}"


def without_empty(rows: Rows) -> list[dict[str, Any]]:
  """Returns the rows without columns in which all are None."""
  kept = [n for n in columns(rows) if any(r.get(n) is not None for r in rows)]
  return [{name: row.get(name) for name in kept} for row in rows]


def write_csv(path: str | os.PathLike, rows: Rows) -> None:
  """Writes rows under their columns' names, numbers in full."""
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, columns(rows))
  writer.writeheader()
  writer.writerows(rows)
  path = pathlib.Path(path)
  with folders.writing(path):
    folders.write_text(path, text.getvalue())
