"""Strict JSON Lines reader for untrusted files: one object per line.

Accepts standard JSON only: no NaN, no duplicate keys, no invalid Unicode, and
no number that floating point has no place for.
Line length and nesting are bounded. Blank lines are skipped. Errors name the
file and the line.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, no_type_check

from research.data.sources import (
  NoExamples,
  Paths,
  Split,
  convert_hint,
  expand,
  is_stream,
  split_of,
)
from research.errors import UserError

MAX_LINE = 1 << 24
"""Maximum length of a line, in bytes."""

MAX_DEPTH = 32
"""Maximum nesting of objects and lists."""


class Record(NamedTuple):
  """One object and its location, `file:line`."""

  values: dict[str, Any]
  where: str

  def get(self, path: str) -> Any:
    """Returns the field at a dotted path, e.g. `meta.id`; None if absent."""
    found: Any = self.values
    for name in path.split("."):
      found = found.get(name) if isinstance(found, dict) else None
    return found

  def text(self, path: str) -> str:
    """Returns a text field.

    Raises:
      UserError: the field is missing or not text.
    """
    found = self.get(path)
    if not isinstance(found, str):
      raise self.wrong(path, found, "text")
    return found

  def wrong(self, path: str, found: Any, expected: str) -> UserError:
    """Returns the error for a field with an unexpected value."""
    if found is None:
      shown = f"none among {', '.join(list(self.values)[:8]) or 'no fields'}"
    else:
      shown = f"{type(found).__name__} {str(found)[:60]!r}"
    return UserError(
      f"{self.where}: field {path!r}: found {shown}, expected {expected}.\n"
      "Correct the line, or name another field."
    )


Parse = Callable[[Record], Any]
"""Returns a record's fields; raises UserError if one is wrong."""


def whole(record: Record) -> Record:
  """Returns the record itself, whatever its fields."""
  return record


def read(
  paths: Paths,
  split: Split | None = None,
  key: str | None = None,
  parse: Parse = whole,
) -> list[Any]:
  """Reads the records of several files, in order.

  Args:
    paths: UTF-8 files, see `sources.expand`.
    split: return only the records of this split; None for all.
    key: dotted path of the field whose hash decides the split, so that records
      with the same value are in the same split; None for the whole record.
    parse: is called with every record, also those of other splits, so that a
      wrong field is reported before an empty split.

  Returns:
    What `parse` returned of the records of the split; by default, these.

  Raises:
    NoExamples: no record is in the split.
    UserError: a file cannot be read, or a line is invalid.
  """
  files = expand(paths)
  found = [record for path in files for record in _lines(path)]
  parsed = [parse(record) for record in found]
  if split is None:
    return parsed
  chosen = [
    value
    for record, value in zip(found, parsed, strict=True)
    if split_of(_name(record, key)) == split
  ]
  if not chosen:
    more = f", a key with more values than {key!r} has," if key else ""
    raise NoExamples(
      f"{', '.join(files)[:200]}: none of {len(found)} records is in the split"
      f" {split!r}.\nGive more records{more} or no split."
    )
  return chosen


def check_files(paths: Paths, key: str | None, parse: Parse) -> None:
  """Checks every record of several files, and keeps none.

  Pipes and devices are left out, since they can be read only once.

  Args:
    paths, key, parse: as for `read`.

  Raises:
    UserError: a file cannot be read, or a record is wrong.
  """
  for path in expand(paths):
    if is_stream(path):
      continue
    for record in _lines(path):
      parse(record)
      if key is not None:
        _name(record, key)


def _name(record: Record, key: str | None) -> str:
  value = record.values if key is None else record.get(key)
  if value is None:
    raise record.wrong(key or "", None, "the value that decides the split")
  if isinstance(value, str):
    return value
  return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _lines(path: str) -> Iterator[Record]:
  count = 0
  try:
    with pathlib.Path(path).open("rb") as file:
      number = 0
      while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
          raise UserError(
            f"{path}:{number}: found a line of more than {MAX_LINE:,} bytes.\n"
            "Expected one JSON object a line; is this one JSON array?"
          )
        text = _text(line, f"{path}:{number}", first=number == 1)
        if text.strip():
          count += 1
          yield parse(text, f"{path}:{number}")
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror}).\n"
      "Expected a JSON Lines file; check the path."
    ) from error
  if not count:
    raise UserError(f"{path}: holds no records. Expected JSON, one a line.")


def _text(line: bytes, where: str, first: bool) -> str:
  try:
    return line.decode("utf-8-sig" if first else "utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where}: not UTF-8: byte 0x{line[error.start]:02x} at column"
      f" {error.start + 1}.\n{convert_hint(line if first else b'')}"
    ) from error


def parse(text: str, where: str) -> Record:
  """Returns the record of one object's JSON.

  Args:
    text: of a stranger.

  Raises:
    UserError: the text is not one object of standard JSON.
  """
  try:
    found = json.loads(
      text, object_pairs_hook=_unique, parse_constant=_no_constant
    )
  except json.JSONDecodeError as error:
    if text.lstrip().startswith("["):
      raise UserError(
        f"{where}: found the beginning of a JSON array, expected JSON Lines:"
        " one object a line.\nConvert it, e.g. with jq -c '.[]'."
      ) from error
    raise UserError(
      f"{where}: is not JSON: {error.msg} at column {error.colno}.\n"
      "Expected one JSON object a line."
    ) from error
  except RecursionError as error:
    raise _too_deep(where) from error
  except ValueError as error:  # ours, or an integer of thousands of digits
    raise UserError(
      f"{where}: {str(error)[:200]}.\nExpected standard JSON."
    ) from error
  if not isinstance(found, dict):
    raise UserError(
      f"{where}: found a {type(found).__name__}, expected a JSON object:"
      ' {"field": value, ...}.'
    )
  _check(found, where)
  return Record(found, where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"found the key {twice[:60]!r} twice in one object")
  return found


def _no_constant(name: str) -> Any:
  raise ValueError(f"found {name}, which is not a JSON number")


def _too_deep(where: str) -> UserError:
  return UserError(
    f"{where}: found more than {MAX_DEPTH} objects and lists inside one"
    " another.\nExpected a record of a few levels."
  )


@no_type_check
def _check(value: Mapping[str, Any], where: str) -> None:
  """Raises UserError for deep nesting, infinities, and invalid Unicode."""
  waiting = [(value, 1)]
  while waiting:
    x, depth = waiting.pop()
    if depth > MAX_DEPTH:
      raise _too_deep(where)
    if isinstance(x, dict):
      waiting += [(y, depth) for y in x]
      waiting += [(y, depth + 1) for y in x.values()]
    elif isinstance(x, list):
      waiting += [(y, depth + 1) for y in x]
    elif isinstance(x, float) and math.isinf(x):
      raise UserError(
        f"{where}: found a number too large for 64 bits, such as 1e999.\n"
        "Expected one below 1.8e308."
      )
    elif isinstance(x, str) and not x.isascii():
      try:
        x.encode("utf-8")
      except UnicodeEncodeError as error:
        raise UserError(
          f"{where}: found half a surrogate pair, \\u{ord(x[error.start]):x},"
          " in a text.\nExpected Unicode; write the character itself."
        ) from error
