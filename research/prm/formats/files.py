"""Files of labelled solutions: read strictly, written without loss.

A `Format` is the layout of one record. Fields that a layout does not define
are kept in `LabelledSolution.extra` and written back. A record that a
single-solution format reads is refused where writing it would not give the same
record: a layout that is only almost the published one never loses anything
silently.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from research.data.sources import jsonl
from research.data.sources.jsonl import Record
from research.errors import UserError
from research.prm.labelled import LabelledSolution


@runtime_checkable
class Format(Protocol):
  """The layout of a record, JSON, that has one solution or several.

  Attributes:
    single: whether a record is one solution, which `values` gives back.
  """

  single: ClassVar[bool]

  def solutions(self, record: Record) -> list[LabelledSolution]:
    """Returns the solutions of a record.

    Raises:
      UserError: names the file, line and field that is not as published.
    """
    ...

  def values(self, solution: LabelledSolution) -> dict[str, Any]:
    """Returns a record that has this solution.

    Raises:
      UserError: the layout has no place for it.
    """
    ...


class Skipped(NamedTuple):
  """A record that could not be read.

  Attributes:
    where: its file and line.
    reason: what was found there, and what was expected.
  """

  where: str
  reason: str


MAX_BYTES = 1 << 28
"""Maximum size of a file that is one JSON object; CHAMP's has 72 MB."""


def read(path: str, format: Format) -> list[LabelledSolution]:
  """Reads JSON Lines of one format; `.json` is one record.

  Args:
    path: one file, or a pattern of several.
    format: their layout, such as `FORMATS["prm800k"]`.

  Raises:
    UserError: a file cannot be read, or a record is not of the layout; the
      first one that is not.
  """
  return [x for record in records(path) for x in solutions_of(record, format)]


def read_valid(
  path: str, format: Format
) -> tuple[list[LabelledSolution], list[Skipped]]:
  """Reads those records that are valid, and says which were not.

  Published sets have rows with annotation errors (Math-Shepherd's have a tag
  missing, or a step twice): count and report what was left out.

  Args:
    path, format: as for `read`.
  """
  solutions: list[LabelledSolution] = []
  skipped: list[Skipped] = []
  for record in records(path):
    try:
      solutions += solutions_of(record, format)
    except UserError as error:
      skipped.append(Skipped(record.where, str(error)))
  return solutions, skipped


def records(path: str) -> list[Record]:
  """Returns the records of a file, as they are, without their solutions."""
  if not path.endswith(".json"):
    return jsonl.read(path)
  try:
    size = os.path.getsize(path)
    text = "" if size > MAX_BYTES else pathlib.Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: cannot be read as UTF-8 ({error})") from error
  if size > MAX_BYTES:
    raise UserError(
      f"{path}: found {size:,} bytes, expected at most {MAX_BYTES:,} in one"
      " JSON object.\nWrite it as JSON Lines, one record a line."
    )
  return [jsonl.parse(text, path)]


def solutions_of(record: Record, format: Format) -> list[LabelledSolution]:
  """Returns the solutions of one record.

  Raises:
    UserError: it is not of the layout, or would not be written as it is.
  """
  try:
    solutions = format.solutions(record)
  except UserError as error:
    if str(error).startswith(record.where):
      raise
    raise UserError(f"{record.where}: {error}") from error
  if format.single:
    _check_lossless(record, format.values(solutions[0]))
  return solutions


def _check_lossless(record: Record, written: Mapping[str, Any]) -> None:
  for name, value in record.values.items():
    if name not in written or not _same(value, written[name]):
      was, would = str(value), str(written.get(name))
      at = next(
        (i for i, (x, y) in enumerate(zip(was, would, strict=False)) if x != y),
        min(len(was), len(would)),
      )
      raise UserError(
        f"{record.where}: field {name!r}: found {was[at : at + 40]!r} at"
        f" character {at}, where the layout has {would[at : at + 40]!r}.\n"
        "Correct the record, or leave it out (read_valid does)."
      )


def _same(a: Any, b: Any) -> bool:
  """Whether two values are the same JSON: true is not 1, nor is 1.0."""
  if type(a) is not type(b):
    return False
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(_same(x, b[k]) for k, x in a.items())
  if isinstance(a, list):
    return len(a) == len(b) and all(map(_same, a, b))
  return a == b


def write(
  path: str, solutions: Iterable[LabelledSolution], format: Format
) -> None:
  """Writes solutions as JSON Lines, a record each.

  Args:
    path: the file, which is replaced.

  Raises:
    UserError: the layout has no place for a solution; nothing is written.
  """
  lines = list(_lines(solutions, format))
  pathlib.Path(path).write_text("".join(lines), "utf-8")


def write_records(path: str, kept: Iterable[Record]) -> None:
  """Writes records as they were read, every field of theirs.

  Args:
    path: the file, which is replaced.
    kept: records, such as those of `records` that a filter left.
  """
  lines = [json.dumps(x.values, ensure_ascii=False) + "\n" for x in kept]
  pathlib.Path(path).write_text("".join(lines), "utf-8")


def _lines(
  solutions: Iterable[LabelledSolution], format: Format
) -> Iterator[str]:
  for i, solution in enumerate(solutions):
    try:
      values = format.values(solution)
    except UserError as error:
      raise UserError(f"solution {i}: {error}") from error
    yield json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


# --- what formats share ---

NUMBERS = "labels are numbers"
"""Extra field that keeps how a record writes labels of 0 and 1."""


def extra(record: Record, known: Iterable[str]) -> dict[str, Any]:
  """Returns the fields that a layout does not define."""
  names = set(known)
  return {k: v for k, v in record.values.items() if k not in names}


def texts(record: Record, name: str) -> tuple[str, ...]:
  """Returns a field that is a list of texts."""
  return tuple(items(record, name, str, "a list of texts"))


def items(
  record: Record, name: str, kind: type | tuple[type, ...], expected: str
) -> Sequence[Any]:
  """Returns a list field whose items are of a type; `bool` is no `int`."""
  values = record.get(name)
  if not isinstance(values, list):
    raise record.wrong(name, values, expected)
  kinds = kind if isinstance(kind, tuple) else (kind,)
  for i, x in enumerate(values):
    if type(x) not in kinds:
      raise record.wrong(f"{name}[{i}]", x, expected)
  return values


def boolean(record: Record, name: str) -> bool:
  """Returns a field that is true or false."""
  value = record.get(name)
  if not isinstance(value, bool):
    raise record.wrong(name, value, "true or false")
  return value


def choice(
  record: Record, name: str, value: Any, allowed: Mapping[Any, Any]
) -> Any:
  """Returns what a value stands for.

  Raises:
    UserError: it stands for nothing.
  """
  if type(value) in (str, int, type(None)) and value in allowed:
    return allowed[value]
  shown = ", ".join(map(repr, allowed))
  raise record.wrong(name, value, f"one of {shown}")


def chat(record: Record, name: str) -> list[tuple[str, str]]:
  """Returns the (role, content) of each message of a conversation."""
  messages = items(record, name, dict, "a list of messages")
  turns = []
  for i, message in enumerate(messages):
    where = Record(message, f"{record.where}: {name}[{i}]")
    if message.keys() != {"role", "content"}:
      raise where.wrong("role", None, "role and content, and nothing else")
    turns.append((where.text("role"), where.text("content")))
  return turns


def messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
  """Returns the conversation of these (role, content)."""
  return [{"role": role, "content": content} for role, content in turns]


def check_steps(solution: LabelledSolution) -> None:
  """Raises UserError for a solution without steps, in a layout of turns."""
  if not solution.steps:
    raise UserError("steps: found none, expected one at least: each is a turn")


def hard(solution: LabelledSolution, names: Callable[[int], Any]) -> list[Any]:
  """Returns each step's label in a layout that has right and wrong alone.

  Raises:
    UserError: a label is soft or unknown.
  """
  for i, label in enumerate(solution.labels):
    if label not in (0, 1):
      raise UserError(
        f"labels[{i}]: found {label}, expected 0 or 1: this layout has no soft"
        " and no unknown labels.\nMake them hard, or cut the steps after the"
        " first error."
      )
  return [names(int(label or 0)) for label in solution.labels]
