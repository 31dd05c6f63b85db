"""Tables: what stands where, to the byte."""

import pytest

from research import tables

ROWS = [("name", "loss", "of"), ("long name", "1.25", ""), ("x", "10.125", "y")]


def test_columns_are_aligned_and_lines_end_with_text():
  assert tables.aligned(ROWS, right=[1]) == [
    "name         loss  of",
    "long name    1.25",
    "x          10.125  y",
  ]
  assert tables.aligned(ROWS[1:2]) == ["long name  1.25"]
  assert tables.aligned([]) == []


def test_rows_of_different_lengths_are_a_mistake():
  with pytest.raises(ValueError):
    tables.aligned([("a", "b"), ("c",)])


def test_markdown():
  head, *rows = ROWS
  assert tables.markdown(head, rows) == (
    "| name | loss | of |\n"
    "| --- | --- | --- |\n"
    "| long name | 1.25 |  |\n"
    "| x | 10.125 | y |"
  )
