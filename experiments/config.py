"""From gin files to an `Experiment`, and back to text that rebuilds it.

The only module that imports gin. Files use dynamic registration (their first
line is `from __gin__ import dynamic_registration`), so the library carries no
decorator: a file imports the modules it configures and binds their arguments
by name. Types are checked by the run-time hook, since a gin value is an
argument like any other.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gin
from gin import config as gin_config

from experiments.experiment import Experiment
from research.typing import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
"""Beside the package, in a checkout and in an installation alike."""

ROOT = "experiment.Experiment"


class Loaded(NamedTuple):
  """An experiment and the text that rebuilds it."""

  experiment: Experiment
  text: str


def find(path: str) -> pathlib.Path:
  """Returns the gin file named `path`: as given, or under `configs/`."""
  for candidate in (pathlib.Path(path), CONFIGS / path):
    if candidate.is_file():
      return candidate.resolve()
  near = ", ".join(
    sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("runs/**/*.gin"))
  )
  raise UserError(
    f"--config={path}: no such file, neither here nor under configs/.\n"
    f"Runs that exist: {near or 'none'}."
  )


def load(path: str, bindings: Sequence[str] = ()) -> Loaded:
  """Returns the experiment that a gin file describes.

  Args:
    path: a gin file; relative ones are also looked for under `configs/`.
    bindings: more lines, which win: `"STEPS = 20"`, `"LoRA.rank=4"`.

  Raises:
    UserError: the file is missing, or names what does not exist, or gives a
      value of the wrong type.
  """
  return parse(find(path).read_text("utf-8"), bindings, name=path)


def parse(
  text: str, bindings: Sequence[str] = (), name: str = "config"
) -> Loaded:
  """Returns the experiment that gin `text` describes; see `load`."""
  for line in bindings:
    if not re.fullmatch(r"\s*[\w./]+\s*=\s*\S.*", line, re.DOTALL):
      raise UserError(
        f"--set={line}: expected NAME=VALUE, e.g. --set=TOKENS=4096 or "
        "--set=adapt.Adapt.rank=16."
      )
  with _clean(), _readable(name):
    gin_config.add_config_file_search_path(str(CONFIGS))
    gin.parse_config(text)
    gin.parse_config("\n".join(bindings))
    _finalize()
    experiment = gin.get_configurable(_root())()
    return Loaded(experiment, gin.operative_config_str())


@contextlib.contextmanager
def _clean() -> Iterator[None]:
  """Leaves gin's global state as empty as it was found."""
  gin.clear_config()
  try:
    yield
  finally:
    gin.clear_config()


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
  """Turns gin's and the type checker's errors into the user's."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{name}: {_shorten(error)}") from error


def _root() -> str:
  return ROOT


def _finalize() -> None:
  gin.finalize()


def _shorten(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text if len(text) < 600 else text[:600] + " ..."
