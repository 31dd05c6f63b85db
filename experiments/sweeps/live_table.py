"""A table at the bottom of a terminal, which is drawn again in its place."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.core import tables

INTERVAL = 0.5
"""Seconds between two drawings."""

_UP_AND_CLEAR = "\x1b[{}F\x1b[J"  # ECMA-48: to the line's start, N lines up


class LiveTable:
  """The table; draws nothing where there is no terminal."""

  def __init__(
    self,
    out: Any = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Draws on a stream, by default stdout; `clock` returns seconds."""
    self._out, self._clock = out or sys.stdout, clock
    self._live = self._out.isatty()
    self._lines, self._next = 0, clock()

  def draw(self, rows: Callable[[], tables.Rows]) -> None:
    """Draws the rows that are returned, if it is time; see `tables.text`."""
    if not self._live or self._clock() < self._next:
      return
    width, height = shutil.get_terminal_size()
    found = rows()
    lines = tables.text(found).splitlines() if found else []
    lines = lines[: max(1, height - 2)]
    self.clear()
    # A line that wraps would be two, when it is cleared.
    self._out.write("".join(f"{line[: width - 1]}\n" for line in lines))
    self._out.flush()
    self._lines, self._next = len(lines), self._clock() + INTERVAL

  def clear(self) -> None:
    """Removes the table, for other lines to be printed."""
    if self._lines:
      self._out.write(_UP_AND_CLEAR.format(self._lines))
      self._out.flush()
      self._lines = 0
