"""Typed access to a JSON object from a stranger's file."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fields:
  """Typed access to a JSON object; errors name the file and the field.

  Attributes:
    values: the object.
    where: its file, and its place in there.
    defaults: of fields that it leaves out.
  """

  values: Mapping[str, Any]
  where: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def get(self, name: str) -> Any:
    return self.values.get(name, self.defaults.get(name))

  def wrong(self, name: str, expected: str) -> UserError:
    found = repr(self.get(name))[:80]
    return UserError(f"{self.where}: {name} is {found}, expected {expected}")

  def integer(self, name: str, least: int = 1, most: int = 2**24) -> int:
    """Returns a whole number from `least` to `most`."""
    x = self.get(name)
    if type(x) is not int or x < least:
      raise self.wrong(name, f"a whole number of at least {least}")
    if x > most:
      raise self.wrong(name, f"at most {most}")
    return x

  def divisor(self, name: str, whole: int) -> int:
    """Returns a whole number that divides `whole`."""
    x = self.integer(name)
    if whole % x:
      raise self.wrong(name, f"a divisor of {whole}")
    return x

  def maybe_integer(self, name: str) -> int | None:
    return None if self.get(name) is None else self.integer(name)

  def number(self, name: str) -> float:
    """Returns a finite number above zero."""
    x = self.get(name)
    if type(x) not in (int, float) or not 0 < x < 1e30:
      raise self.wrong(name, "a number above 0")
    return float(x)

  def maybe_number(self, name: str) -> float | None:
    return None if self.get(name) is None else self.number(name)

  def rate(self, name: str) -> float:
    """Returns a probability of dropping, in [0, 1)."""
    x = self.get(name)
    if type(x) not in (int, float) or not 0 <= x < 1:
      raise self.wrong(name, "at least 0 and below 1")
    return float(x)

  def flag(self, name: str) -> bool:
    """Returns true or false; false where it is left out or null."""
    x = self.get(name)
    if x is not None and type(x) is not bool:
      raise self.wrong(name, "true or false")
    return bool(x)

  def object(self, name: str) -> "Fields | None":
    """Returns the object `name`, or None where it is absent or empty."""
    x = self.get(name)
    if x is not None and not isinstance(x, dict):
      raise self.wrong(name, "an object or null")
    return Fields(x, f"{self.where}: {name}") if x else None

  def known(self, names: Collection[str]) -> None:
    """Raises UserError for a field with another name.

    What a file says is applied, or refused by name.
    """
    if unknown := sorted(set(self.values) - set(names)):
      raise UserError(
        f"{self.where}: {unknown[0]!r} is not understood, expected one of"
        f" {', '.join(sorted(names))}"
      )

  def neutral(self, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError unless each field has a value that means "off"."""
    for name, values in allowed.items():
      if self.values.get(name) not in values:
        shown = " or ".join(map(repr, values))
        raise self.wrong(name, f"{shown}: this feature is not supported")
