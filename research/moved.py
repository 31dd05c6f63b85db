"""Where modules are that had another name: configurations still say the old.

A gin file imports what it configures, and a run's `config.gin` is read again
for as long as the run is of use. `moved.txt` has a line for each module that
moved: its old name, its new one.
"""

import functools
import pathlib
import re

_TABLE = pathlib.Path(__file__).with_name("moved.txt")
_IMPORT = re.compile(r"^from ([\w.]+) import (\w+)( as \w+)?", re.M)


@functools.cache
def table() -> dict[str, str]:
  """Returns the new name of each module that moved."""
  lines = _TABLE.read_text("utf-8").splitlines()
  return dict(line.split() for line in lines if line.strip())


def current(text: str) -> str:
  """Returns a gin file's text with modules called as they are now.

  What follows an import keeps its meaning: a module whose last name, by which
  gin calls what it imported, is another now is imported under the old one.
  """

  def imported(match: re.Match) -> str:
    old, alias = match[2], match[3] or ""
    package, _, new = table().get(f"{match[1]}.{old}", "").rpartition(".")
    if not new:
      return match[0]
    if new != old:
      alias = alias or f" as {old}"
    return f"from {package} import {new}{alias}"

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
