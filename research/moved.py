"""Old names of modules and configurables, for configurations that use them.

A gin file imports what it configures, and a run's `config.gin` is read again
for as long as the run is of use. `moved.txt` has a line for each name that
changed, the old one and the new one:

  research.training.feed research.training.global_batch
  research.training.loop:Plan research.training.loop:TrainConfig
  research.lora.adapt:Adapt.look research.lora.adapt:Adapt.init_stats

The first is a module; behind a colon stands what gin binds in a module, under
the module's present name.
"""

import functools
import pathlib
import re

_TABLE = pathlib.Path(__file__).with_name("moved.txt")
_FROM = re.compile(r"^from ([\w.]+) import (\w+)", re.M)
_IMPORT = re.compile(r"^import ([\w.]+)", re.M)


@functools.cache
def table() -> dict[str, str]:
  """Returns the new name of each module or configurable that has one."""
  lines = _TABLE.read_text("utf-8").splitlines()
  return dict(line.split() for line in lines if line.strip())


def current(text: str) -> str:
  """Returns a gin file's text in present names.

  Gin calls what it imports by the module's last name, or by the whole name
  after `import research.x`; both are followed.
  """
  called = {}  # what the text calls a module -> (the same today, the module)

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
  """Returns one binding of a command line (`loop.Plan.steps=5`) as of today.

  Without imports beside it a module is known by its last name alone, so this
  follows names of configurables, of modules that kept their own.
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
  """Returns old and new names of what gin binds in `module`."""
  head = f"{module}:"
  return [
    (old.removeprefix(head), new.removeprefix(head))
    for old, new in table().items()
    if old.startswith(head)
  ]


def _renamed(text: str, old: str, new: str) -> str:
  """Replaces a dotted name where it stands whole, or begins a longer one."""
  if old == new:
    return text
  end = "" if old.endswith(".") else r"(?!\w)"
  return re.sub(rf"(?<![\w./]){re.escape(old)}{end}", new, text)


def hint(text: str) -> str:
  """Returns where the modules are that an error says are not, or ""."""
  pairs = re.findall(r"cannot import name '(\w+)' from '([\w.]+)'", text)
  names = [f"{package}.{name}" for name, package in pairs]
  names += re.findall(r"No module named '([\w.]+)'", text)
  found = [f"{x} is now {table()[x]}" for x in names if x in table()]
  return "; ".join(found)
