"""Tables of texts, laid out for a screen or as Markdown."""

from collections.abc import Iterable, Sequence

Row = Sequence[str]
"""The texts of a row's cells."""


def aligned(rows: Sequence[Row], right: Iterable[int] = ()) -> list[str]:
  """Returns a line for each row: columns two spaces apart, none at its end.

  Args:
    rows: of equal length, a head among them if there is one.
    right: columns, from 0, whose cells stand at the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  to_right = set(right)

  def line(row: Row) -> str:
    cells = (
      cell.rjust(width) if i in to_right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()

  return [line(row) for row in rows]


def markdown(head: Row, rows: Iterable[Row]) -> str:
  """Returns a table in Markdown."""
  return "\n".join(map(markdown_row, (head, ["---"] * len(head), *rows)))


def markdown_row(cells: Row) -> str:
  """Returns one line of a table in Markdown."""
  return f"| {' | '.join(cells)} |"
