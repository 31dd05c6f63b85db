"""Flags that say a name, a number and more numbers: `cap:0.1,start=0.6`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from research.typing import UserError

Kinds = Mapping[str, type]
"""Names that may stand behind, and whether int or float."""


@dataclasses.dataclass(frozen=True)
class FlagText:
  """`name[:number][,field=value..]`, of a flag.

  Attributes:
    where: the flag as it was given, for messages.
    name: what is before the colon; empty where the text is nothing such.
    text: what is behind it, None without.
    fields: the others, as they were given.
  """

  where: str
  name: str
  text: str | None
  fields: Mapping[str, str]

  @property
  def number(self) -> float | None:
    """Returns the number, None if there is none."""
    return None if self.text is None else _number(self.text)

  @property
  def whole(self) -> int | None:
    """Returns the whole number, None if there is none."""
    return None if self.text is None else _whole(self.text)

  def numbers(self, kinds: Kinds) -> dict[str, Any]:
    """Returns the named numbers.

    Raises:
      UserError: a name is none of them, or a value no number.
    """
    out = {}
    for name, text in self.fields.items():
      if name not in kinds:
        expected = " or ".join(kinds) or "nothing"
        raise UserError(f"{self.where}: found {name}=, expected {expected}")
      read = _whole if kinds[name] is int else _number
      out[name] = read(text)
      if out[name] is None:
        a = "a whole number" if kinds[name] is int else "a number"
        raise UserError(f"{self.where}: {name} is {text!r}, expected {a}")
    return out

  def build(self, what: Any, kinds: Kinds, **given: Any) -> Any:
    """Returns `what` of these numbers; its complaints name the flag."""
    numbers = self.numbers(kinds)
    try:
      return what(**given, **numbers)
    except UserError as error:
      raise UserError(f"{self.where}: {error}") from error


def parse(flag: str, text: str) -> FlagText:
  """Returns what a flag's text says."""
  first, *more = text.split(",")
  name, colon, number = first.partition(":")
  fields = {}
  for part in more:
    field, equals, value = part.partition("=")
    if not equals or field in fields:
      name = ""
    fields[field] = value
  return FlagText(f"--{flag}={text}", name, number if colon else None, fields)


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
  return int(text) if re.fullmatch("[0-9]{1,6}", text) else None
