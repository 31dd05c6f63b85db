"""Renamed modules and configurables: keeps old gin configurations readable.

A gin file imports the modules that it configures, and the `config.gin` in a
run's working directory must stay readable for as long as the run is used.
`moved.txt` has one line per renamed module or configurable, old name first:

  research.training.feed research.training.global_batch
  research.training.loop:Plan research.training.loop:TrainConfig
  research.lora.adapt:Adapt.look research.lora.adapt:Adapt.init_stats

A line without a colon is a module. After a colon comes a class, function or
field that gin binds, listed under the module's current name.
"""

import functools
import pathlib
import re

_TABLE = pathlib.Path(__file__).with_name("moved.txt")
_FROM = re.compile(r"^from ([\w.]+) import (\w+)", re.M)
_IMPORT = re.compile(r"^import ([\w.]+)", re.M)


@functools.cache
def table() -> dict[str, str]:
  """Returns `{old name: new name}` from `moved.txt`."""
  lines = _TABLE.read_text("utf-8").splitlines()
  return dict(line.split() for line in lines if line.strip())


def current(text: str) -> str:
  """Returns a gin file's text with every old name replaced by the current one.

  Gin refers to an imported module by its last component (`from a import b`) or
  by its full dotted name (`import a.b`). Both forms are handled.
  """
  called = {}  # name used in the text -> (current name, current full module)

  def imported(match: re.Match) -> str:
    old = f"{match[1]}.{match[2]}"
    new = table().get(old, old)
    package, _, last = new.rpartition(".")
    called[match[2]] = last, new
    return f"from {package} import {last}"

  text = _FROM.sub(imported, text)
  for old in _IMPORT.findall(text):
    new = table().get(old, old)
    text = re.sub(
      rf"^import {re.escape(old)}$", f"import {new}", text, flags=re.M
    )
    called[old] = new, new
  for old, (name, module) in called.items():
    text = _renamed(text, f"{old}.", f"{name}.")
    for known, new in _configurables(module):
      text = _renamed(text, f"{name}.{known}", f"{name}.{new}")
  return text


def binding(text: str) -> str:
  """Returns a command-line binding (`loop.Plan.steps=5`) in current names.

  A single binding carries no imports, so a module is identified by its last
  component only. This renames configurables of modules that were not renamed
  themselves.
  """
  for old, new in table().items():
    module, _, known = old.partition(":")
    if known:
      last = module.rpartition(".")[2]
      text = _renamed(
        text, f"{last}.{known}", f"{last}.{new.partition(':')[2]}"
      )
  return text


def _configurables(module: str) -> list[tuple[str, str]]:
  """Returns the (old, new) names of the configurables in `module`."""
  head = f"{module}:"
  return [
    (old.removeprefix(head), new.removeprefix(head))
    for old, new in table().items()
    if old.startswith(head)
  ]


def _renamed(text: str, old: str, new: str) -> str:
  """Replaces a dotted name, alone or as the prefix of a longer dotted name."""
  if old == new:
    return text
  end = "" if old.endswith(".") else r"(?!\w)"
  return re.sub(rf"(?<![\w./]){re.escape(old)}{end}", new, text)


def hint(text: str) -> str:
  """Returns the new location of modules that an import error reports missing.

  Returns "" if the error names no renamed module.
  """
  pairs = re.findall(r"cannot import name '(\w+)' from '([\w.]+)'", text)
  names = [f"{package}.{name}" for name, package in pairs]
  names += re.findall(r"No module named '([\w.]+)'", text)
  found = [f"{x} is now {table()[x]}" for x in names if x in table()]
  return "; ".join(found)
