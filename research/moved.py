"""Where modules are that had another name: configurations still say the old.

A gin file imports what it configures, and a run's `config.gin` is read again
for as long as the run is of use. `moved.txt` has a line for each module that
moved, its old name and its new one; and for each class or field that gin files
bind and that has another name now, `module:Old module:New` or
`module:Class.old module:Class.new`, of the module and the class as they are.
"""

import functools
import pathlib
import re

_TABLE = pathlib.Path(__file__).with_name("moved.txt")
_FROM = re.compile(r"^from ([\w.]+) import (\w+)(?: as (\w+))?", re.M)
_IMPORT = re.compile(r"^import ([\w.]+)(?: as (\w+))?", re.M)


@functools.cache
def _lines() -> dict[str, str]:
  lines = _TABLE.read_text("utf-8").splitlines()
  return dict(line.split() for line in lines if line.strip())


def table() -> dict[str, str]:
  """Returns the new name of each module that moved."""
  return {old: new for old, new in _lines().items() if ":" not in old}


def classes() -> dict[tuple[str, str], str]:
  """Returns new names of classes and fields, by module and old name."""
  found = {}
  for old, new in _lines().items():
    if ":" in old:
      module, name = old.split(":")
      found[module, name] = new.split(":")[1]
  return found


def current(text: str) -> str:
  """Returns a gin file's text with modules and classes called as they are now.

  A module is imported, and called in bindings, by its new last name; where
  another import has that name, under the old one.
  """
  for package, name, alias in _FROM.findall(text):
    new = table().get(f"{package}.{name}")
    if new is None:
      continue
    home, _, last = new.rpartition(".")
    called = alias or name
    if not alias and _called(text).get(last, new) == new:
      text, called = _renamed(text, name, last), last
    said = f"from {home} import {last}"
    said += "" if called == last else f" as {called}"
    before = f"from {package} import {name}" + (f" as {alias}" if alias else "")
    text = re.sub(rf"^{re.escape(before)}\b(?! as )", said, text, flags=re.M)
  for old, _ in _IMPORT.findall(text):
    if old in table():
      text = re.sub(rf"(?<![\w.]){re.escape(old)}\b", table()[old], text)
  for called, module in _called(text).items():
    for (owner, old), new in classes().items():
      if owner == module:
        text = _renamed(text, f"{called}.{old}", f"{called}.{new}")
  return text


def without_unused_imports(text: str) -> str:
  """Returns a configuration without imports that no binding refers to.

  These have no effect: a file may import what only a command line binds, so
  that two equal configurations differ once such an import is added.
  """
  kept, rest = [], re.sub(r"^(from|import)\s.*$", "", text, flags=re.M)
  for line in text.splitlines(keepends=True):
    called = [name for name in _called(line) if name != "dynamic_registration"]
    if all(re.search(rf"(?<![\w.]){re.escape(x)}\.", rest) for x in called):
      kept.append(line)
  return "".join(kept)


def binding(text: str) -> str:
  """Returns one binding of a command line (`loop.Plan.steps=5`) as of today.

  No import says what its module is, so modules of other last names are not
  followed, and classes are by the last name of theirs.
  """
  for (module, old), new in classes().items():
    last = module.rpartition(".")[2]
    text = _renamed(text, f"{last}.{old}", f"{last}.{new}")
  return text


def _called(text: str) -> dict[str, str]:
  """Returns the modules that a gin file imports, by what it calls them."""
  found = {alias or name: name for name, alias in _IMPORT.findall(text)}
  for package, name, alias in _FROM.findall(text):
    found[alias or name] = f"{package}.{name}"
  return found


def _renamed(text: str, old: str, new: str) -> str:
  """Returns the text with what is bound, or referred to, under another name."""
  bound = r"(^[ \t]*|@|^# Parameters for )((?:\w+/)*)" + re.escape(old)
  return re.sub(rf"{bound}(?!\w)", rf"\g<1>\g<2>{new}", text, flags=re.M)


def hint(text: str) -> str:
  """Returns where the modules are that an error says are not, or ""."""
  pairs = re.findall(r"cannot import name '(\w+)' from '([\w.]+)'", text)
  names = [f"{package}.{name}" for name, package in pairs]
  names += re.findall(r"No module named '([\w.]+)'", text)
  found = [f"{x} is now {table()[x]}" for x in names if x in table()]
  return "; ".join(found)
