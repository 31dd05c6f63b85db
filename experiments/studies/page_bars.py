"""A table of a result as a bar chart in SVG, for a page.

Written as text, not by matplotlib, whose output differs between versions: a
test compares a page's pictures with its results, as it does with tables.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from research.training.reports import plots
from research.typing import UserError

ROW, TOP = 26, 30
LEFT, BARS, NOTES = 250, 300, 260
"""Widths in pixels: of names, of the longest bar, of what stands behind it."""

TEXT = "#222"
INTERVAL = ["points", "from", "to"]


def svg(table: Mapping[str, Any]) -> str:
  """Returns the bars of a table's second column, named by its first.

  Columns `points`, `from` and `to`, where there are, are written behind bars.

  Args:
    table: of a result, `results.as_table`; a mean's ± is written beside it.

  Raises:
    UserError: a cell of the second column is not a number of 0 or more.
  """
  names = [row[0] for row in table["rows"]]
  values = [_value(row[1]) for row in table["rows"]]
  at = [table["header"].index(x) for x in INTERVAL if x in table["header"]]
  most = max(values) or 1.0
  height = TOP + ROW * len(names)
  width = LEFT + BARS + NOTES
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}"'
    f' height="{height}" font-family="sans-serif" font-size="13">',
    f'<rect width="{width}" height="{height}" fill="white"/>',
    _text(LEFT - 8, 18, table["header"][0], "end"),
    _text(LEFT, 18, table["header"][1]),
  ]
  for i, (name, value) in enumerate(zip(names, values, strict=True)):
    y, length = TOP + ROW * i, BARS * value / most
    parts += [
      _text(LEFT - 8, y + 14, name, "end"),
      f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 8}"'
      f' fill="{plots.COLORS[0]}"/>',
      _text(
        LEFT + length + 6,
        y + 14,
        _spread(table["rows"][i][1])
        + _interval([table["rows"][i][j] for j in at]),
      ),
    ]
  return "\n".join([*parts, "</svg>"]) + "\n"


def _value(cell: Any) -> float:
  value = cell[0] if isinstance(cell, list) else cell
  if isinstance(value, bool | str) or value is None or not value >= 0:
    raise UserError(f"bars: found {cell!r}, expected a number of 0 or more")
  return float(value)


def _spread(cell: Any) -> str:
  both = cell if isinstance(cell, list) else [cell]
  return " ± ".join(f"{x:.1f}" for x in both if x is not None)


def _interval(cells: Sequence[Any]) -> str:
  """Returns a difference and its interval, nothing where a row has none."""
  if len(cells) != len(INTERVAL) or not all(
    isinstance(x, float | int) for x in cells
  ):
    return ""
  mean, low, high = cells
  return f"  ({mean:+.1f}: {low:.1f} to {high:.1f})"


def _text(x: float | int, y: int, text: str, anchor: str = "start") -> str:
  return (
    f'<text x="{x:.0f}" y="{y}" fill="{TEXT}" text-anchor="{anchor}">'
    f"{html.escape(text)}</text>"
  )
