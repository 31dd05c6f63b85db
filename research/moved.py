"""Where modules are that had another name: configurations still say the old.

A gin file imports what it configures, and a run's `config.gin` is read again
for as long as the run is of use. `moved.txt` has a line for each module that
moved: its old name, its new one.
"""

import functools
import pathlib
import re

_TABLE = pathlib.Path(__file__).with_name("moved.txt")
_IMPORT = re.compile(r"^from ([\w.]+) import (\w+)", re.M)


@functools.cache
def table() -> dict[str, str]:
  """Returns the new name of each module that moved."""
  lines = _TABLE.read_text("utf-8").splitlines()
  return dict(line.split() for line in lines if line.strip())


def current(text: str) -> str:
  """Returns a gin file's text with modules called as they are now.

  What follows an import keeps its meaning, since no module's last name, by
  which gin calls what it imported, has changed.
  """

  def imported(match: re.Match) -> str:
    new = table().get(f"{match[1]}.{match[2]}")
    return (
      match[0]
      if new is None
      else f"from {new[: -len(match[2]) - 1]} import {match[2]}"
    )

  text = _IMPORT.sub(imported, text)
  for old in re.findall(r"^import ([\w.]+)", text, re.M):
    if old in table():
      text = re.sub(rf"(?<![\w.]){re.escape(old)}\b", table()[old], text)
  return text


def hint(text: str) -> str:
  """Returns where the modules are that an error says are not, or ""."""
  pairs = re.findall(r"cannot import name '(\w+)' from '([\w.]+)'", text)
  names = [f"{package}.{name}" for name, package in pairs]
  names += re.findall(r"No module named '([\w.]+)'", text)
  found = [f"{x} is now {table()[x]}" for x in names if x in table()]
  return "; ".join(found)
