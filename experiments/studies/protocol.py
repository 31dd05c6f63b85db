"""What a study is: arms that run one by one, a table, verdicts and pictures.

A run file binds a study to `protocol.Run.study`; `experiments.study` runs it.
"""

import abc
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.core import cli
from experiments.core.stats import Decision
from research.io import folders
from research.training.checkpoints import workdir
from research.typing import UserError

Row = dict[str, Any]
"""What is known of an arm, as JSON has it. A row with `failed`, a sentence, is
of an arm that could not run for a reason of its own; it is data as well."""

Rows = Mapping[str, Row]
"""Rows by their arms' names."""

Lines = list[dict[str, Any]]
"""Lines of a table, values by column; a `stats.Mean` is shown with its ±."""

STATES = {True: "holds", False: "does not hold", None: "undecided"}


class Verdict(NamedTuple):
  """A claim, what was found, and whether it holds; None is undecided."""

  claim: str
  found: str
  holds: Decision

  @property
  def state(self) -> str:
    """Returns the decision as a word or two."""
    return STATES[self.holds]


class Study(abc.ABC):
  """Arms, and what their rows say. Studies are frozen dataclasses.

  Attributes:
    seeds: that arms are repeated with; with one, every verdict is undecided.
      None where errors are over something else, such as texts.
    needs_all: whether `table` needs the rows of all arms.
  """

  seeds: int | None = None
  needs_all: bool = False

  @property
  @abc.abstractmethod
  def arms(self) -> Sequence[str]:
    """Names of the arms, in the order of running."""

  def prepare(self, workdir: pathlib.Path) -> Any:
    """Returns what arms share; called once, and only if an arm has to run."""
    return workdir

  @abc.abstractmethod
  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Runs an arm."""

  def needs(self, arm: str) -> Sequence[str]:
    """Returns the arms whose rows or files an arm needs: all before it."""
    return self.arms[: list(self.arms).index(arm)]

  @abc.abstractmethod
  def table(self, rows: Rows) -> Lines:
    """Returns the lines to print."""

  def tables(self, rows: Rows) -> list[Lines]:
    """Returns all tables of the result, the one of `table` first."""
    return [self.table(rows)]

  @abc.abstractmethod
  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rows of all arms say of the claims."""

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves pictures in the folder."""
    del rows, folder, title

  def settings(self, arm: str) -> str:
    """Returns all that an arm's row depends on, the same in every process."""
    del arm
    return describe(self)

  def summary(self, row: Row) -> str:
    """Returns what to say of a row that has just been measured."""
    del row
    return "done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The root of a run file."""

  study: Study | None = None

  def __post_init__(self):
    if self.study is None:
      raise UserError(
        "protocol.Run.study: is not bound, expected a study, e.g."
        " protocol.Run.study = @study.Study() after"
        " 'from experiments.studies import protocol'"
      )


def distinct(names: Sequence[str], field: str) -> None:
  """Raises UserError if two arms share a name."""
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"{field}: two are called {name!r}.")


def describe(value: Any, *without: str) -> str:
  """Returns a value's settings as text, the same in every process.

  Dataclasses are described by their fields, functions by what they close over,
  arrays by a digest.
  """
  return _text(value, (), without)


def _text(value: Any, outer: tuple[int, ...], without: Any = ()) -> str:
  """Describes a value inside of others, given by their ids."""
  if id(value) in outer:
    return "..."
  outer = (*outer, id(value))
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    names = [f.name for f in dataclasses.fields(value)]
    fields = {n: getattr(value, n) for n in names if n not in without}
    return f"{type(value).__qualname__}({_items(fields, outer)})"
  if isinstance(value, Mapping):
    return f"{{{_items(value, outer)}}}"
  if isinstance(value, list | tuple):
    return f"({', '.join([_text(x, outer) for x in value])})"
  if isinstance(value, set | frozenset):
    return f"({', '.join(sorted([_text(x, outer) for x in value]))})"
  if isinstance(value, functools.partial):
    given = [_text(x, outer) for x in (value.func, *value.args)]
    return f"partial({', '.join(given)}, {_items(value.keywords, outer)})"
  if hasattr(value, "dtype") and hasattr(value, "tobytes"):
    digest = hashlib.sha256(value.tobytes()).hexdigest()[:12]
    return f"{value.dtype}{list(value.shape)} {digest}"
  function = inspect.unwrap(value) if callable(value) else value
  if inspect.isroutine(function):
    parts = [getattr(function, "__self__", None)]
    parts += map(_content, getattr(function, "__closure__", None) or ())
    inner = [_text(x, outer) for x in parts if x is not None]
    return f"{function.__qualname__}({', '.join(inner)})"
  # An address is another in each process.
  return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _items(values: Mapping[Any, Any], outer: tuple[int, ...]) -> str:
  return ", ".join([f"{k}={_text(x, outer)}" for k, x in values.items()])


def _content(cell: Any) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # of a function that is not defined yet
    return None


def check_settings(path: pathlib.Path, found: str | None, now: str) -> None:
  """Checks that a stored file was made from the settings of now.

  Args:
    found: the settings that it was made from; None where it has no record.

  Raises:
    UserError: they differ, by more than imports that nothing uses.
  """
  if found is not None:
    found, now = map(workdir.without_unused_imports, (found, now))
  if found == now:
    return
  mend = "Use another --workdir, or remove that file."
  if found is None:
    raise UserError(
      f"{path}: found no settings in it, expected those of its arm: an older "
      f"command wrote it.\n{mend}"
    )
  pairs = enumerate(zip(found, now, strict=False))
  at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(now)))
  at = max(at - 30, 0)
  raise UserError(
    f"{path}: was made from other settings.\n"
    f"Found ...{found[at : at + 70]}..., expected ...{now[at : at + 70]}...\n"
    f"{mend}"
  )


class Store(NamedTuple):
  """Rows of arms, a file each, which is written whole or not at all."""

  folder: pathlib.Path

  def path(self, arm: str) -> pathlib.Path:
    """Returns an arm's file, which need not be there."""
    return self.folder / (re.sub(r"[^\w.-]+", "_", arm) + ".json")

  def read(self, arm: str, settings: str) -> dict[str, Any] | None:
    """Returns what `write` wrote: the row and its origin; None if not there.

    Raises:
      UserError: the file is damaged, another arm's, or of other settings.
    """
    path = self.path(arm)
    if not path.exists():
      return None
    try:
      found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
      raise UserError(f"{path}: is no JSON ({error}); remove it") from error
    check_settings(path, found.get("settings"), settings)
    if found["arm"] != arm:
      raise UserError(
        f"{path}: found the arm {found['arm']!r}, expected {arm!r}: rename one"
      )
    return found

  @contextlib.contextmanager
  def claimed(self, arm: str) -> Iterator[bool]:
    """Context in which no other process runs an arm; False if one does now."""
    path = self.path(arm).with_suffix(".lock")
    self.folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
      try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
          yield False
          return
        # A file system without locks: one process at a time, as before.
      yield True
      path.unlink(missing_ok=True)

  def write(self, arm: str, settings: str, row: Row, **origin: Any) -> None:
    """Writes an arm's file."""
    self.folder.mkdir(parents=True, exist_ok=True)
    text = {"arm": arm, "settings": settings, **origin, "row": row}
    folders.write_text(self.path(arm), json.dumps(cli.plain(text)))
