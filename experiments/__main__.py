"""The index of commands: `python -m experiments`, and the script `heptad`.

  heptad            lists the commands
  heptad --version  prints the version
  heptad train ...  does what python -m experiments.train ... does

`python -m` takes packages from the working directory first, where a folder of
the user's own may be called experiments or research. The script imports
Heptad's packages before it looks there, so it runs in any directory.
"""

import ast
import difflib
import importlib
import importlib.metadata
import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from experiments.core import runtime

if __name__ == "__main__":
  runtime.check_packages()
from experiments.core import cli  # noqa: E402

_HERE = pathlib.Path(__file__).resolve().parent
_HELP = ("--help", "-h", "-help", "help")


def commands() -> dict[str, pathlib.Path]:
  """Returns each command's file, by command."""
  return {
    path.stem: path
    for path in sorted(_HERE.glob("*.py"))
    if not path.stem.startswith("_")
  }


def _first_line(path: pathlib.Path) -> str:
  tree = ast.parse(path.read_text("utf-8"))
  return (ast.get_docstring(tree) or "").partition("\n")[0]


def index() -> str:
  """Returns the list of commands, as `heptad` without arguments prints it."""
  lines = [
    textwrap.fill(
      _first_line(path),
      78,
      initial_indent=f"  {name:<12}",
      subsequent_indent=" " * 14,
    )
    for name, path in commands().items()
  ]
  return "\n".join(
    [
      "heptad COMMAND [--flag=value ...], or python -m experiments.COMMAND",
      "",
      *lines,
      "",
      "heptad COMMAND --help says what a command does, and lists its flags.",
      "python -m kernels_pallas.inspect reads the schedule of a kernel for a",
      "TPU or GPU that is not here.",
    ]
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Lists the commands, or runs one, which ends the process.

  Returns:
    The exit status, where no command ran.
  """
  argv = list(sys.argv if argv is None else argv)
  if len(argv) == 1 or argv[1] in _HELP:
    cli.say(index())
    return 0
  if argv[1] == "--version":
    cli.say(f"heptad {importlib.metadata.version('heptad')}")
    return 0
  name = argv[1]
  if name not in commands():
    near = difflib.get_close_matches(name, commands(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    print(
      f"error: {name}: no such command; {hint}heptad lists them",
      file=sys.stderr,
    )
    return 2
  runtime.prepare(argv, resumes=name == "train")
  import_before_working_directory()
  sys.argv = [f"heptad {name}", *argv[2:]]
  cli.run(importlib.import_module(f"experiments.{name}").main)


def import_before_working_directory() -> None:
  """Lets modules of the working directory be imported, behind Heptad's own.

  Configurations may name modules of the user's. `python -m` lets them come
  first; a script's path has no working directory at all.
  """
  for package in runtime.PACKAGES:
    importlib.import_module(package)
  here = os.getcwd()
  if not {"", here} & set(sys.path):
    sys.path.append(here)


if __name__ == "__main__":
  sys.exit(main())
