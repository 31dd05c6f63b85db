"""Ranges of hyper-parameters, declared in the annotation of a field.

  class Clip(Ranged):
    lower: PositiveFloat = 0.2
    rows: PositiveInt | None = None

`Ranged` checks them when an object is made: that is when a configuration is
read, before a model is loaded, and with type checks off as well: a word, a bool
or None in place of a number is an error too. What only a run has the value of,
such as a schedule or a traced array, has no range.
"""

import dataclasses
import functools
import math
import numbers
import operator
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, no_type_check

from research.errors import UserError


@no_type_check  # or importing this module would import beartype
@dataclasses.dataclass(frozen=True, repr=False)
class Range:
  """Bounds of a finite number.

  Attributes:
    at_least, above, at_most, below: bounds.
    multiple: what divides the number, if any.
    why: the reason, or the fix, for the error.
    infinite: whether infinity is allowed as well.
  """

  at_least: float | int = -math.inf
  above: float | int = -math.inf
  at_most: float | int = math.inf
  below: float | int = math.inf
  multiple: int | None = None
  why: str = ""
  infinite: bool = False

  def __contains__(self, value: Any) -> bool:
    if value is None or isinstance(value, str | bool):
      return False
    if not isinstance(value, numbers.Real):
      return True
    return (
      (math.isfinite(value) or (self.infinite and value == math.inf))
      and self.at_least <= value <= self.at_most
      and self.above < value
      and (value < self.below or self.infinite)
      and not (self.multiple and value % self.multiple)
    )

  def __repr__(self) -> str:
    low, high = self.at_least, self.at_most
    if -math.inf < low < high < math.inf:
      return f"{low:,} to {high:,}"
    bounds = {
      f"a multiple of {self.multiple}": self.multiple,
      f"at least {low:,}": low > -math.inf,
      f"above {self.above:,}": self.above > -math.inf,
      f"at most {high:,}": high < math.inf,
      f"below {self.below:,}": self.below < math.inf,
    }
    return " and ".join(text for text, is_bound in bounds.items() if is_bound)


@no_type_check  # or importing this module would import beartype
@dataclasses.dataclass(frozen=True, repr=False)
class Choice:
  """A few allowed values."""

  values: tuple[Any, ...]
  why: str = ""

  def __contains__(self, value: Any) -> bool:
    return value in self.values

  def __repr__(self) -> str:
    *others, last = map(str, self.values)
    return f"{', '.join(others)} or {last}" if others else last


@no_type_check
def Real(**bounds: Any) -> Any:
  """Returns the type of numbers in a `Range`."""
  return Annotated[float | int, Range(**bounds)]


@no_type_check
def Whole(**bounds: Any) -> Any:
  """Returns the type of whole numbers in a `Range`."""
  return Annotated[int, Range(**bounds)]


@no_type_check
def AtLeast(low: int, why: str = "") -> Any:
  """Returns the type of whole numbers from `low` on."""
  return Annotated[int, Range(at_least=low, why=why)]


@no_type_check
def Between(low: int, high: int) -> Any:
  """Returns the type of whole numbers from `low` to `high`."""
  return Annotated[int, Range(at_least=low, at_most=high)]


@no_type_check
def OneOf(*values: Any) -> Any:
  """Returns the type of one of several values."""
  kind = functools.reduce(operator.or_, map(type, values))
  return Annotated[kind, Choice(values)]


PositiveInt = AtLeast(1)
NonNegativeInt = AtLeast(0)
PositiveFloat = Real(above=0)
NonNegativeFloat = Real(at_least=0)
Share = Real(at_least=0, at_most=1)
PositiveShare = Real(above=0, at_most=1)
Decay = Real(at_least=0, below=1)


class Ranged:
  """A dataclass whose fields are within the ranges of their annotations.

  A subclass with a `__post_init__` calls this one first.
  """

  def __post_init__(self) -> None:
    for name, kind in ranged_fields(type(self)).items():
      _check(f"{type(self).__name__}.{name}", kind, getattr(self, name))

  def expect(
    self, name: str, at_least: Any, at_most: Any = math.inf, **bounds: Any
  ) -> None:
    """Raises UserError for a field out of a range that other fields set."""
    kind = Real(at_least=at_least, at_most=at_most, **bounds)
    _check(f"{type(self).__name__}.{name}", kind, getattr(self, name))


@functools.cache
def ranged_fields(cls: type) -> dict[str, Any]:
  """Returns the annotations of a dataclass's fields that have a range."""
  return {
    field.name: field.type
    for field in dataclasses.fields(cls)
    if _is_ranged(field.type)
  }


def check(where: str, kind: Any, /, **values: Any) -> None:
  """Raises UserError for a value outside of the ranges of a type.

  Args:
    where: the class or function that the values belong to, for the error.
    kind: the annotation.
    **values: by name; None passes.
  """
  for name, value in values.items():
    if value is not None:
      _check(f"{where}.{name}", kind, value)


def _is_ranged(kind: Any) -> bool:
  bounds = getattr(kind, "__metadata__", ())
  return any(isinstance(x, Range | Choice) for x in bounds) or any(
    map(_is_ranged, get_args(kind))
  )


def _check(where: str, kind: Any, value: Any, else_none: str = "") -> None:
  origin, arms = get_origin(kind), get_args(kind)
  if origin is Annotated:
    fraction = arms[0] is int and isinstance(value, float)
    for bound in kind.__metadata__:
      if isinstance(bound, Range | Choice) and (fraction or value not in bound):
        number = "a whole number, " if fraction else _number(bound, value)
        raise UserError(
          f"{where}: found {value!r}, expected {number}{bound}{else_none}"
          f"{bound.why and f': {bound.why}'}."
        )
  elif origin in (Union, types.UnionType):
    optional = types.NoneType in arms
    for arm in () if optional and value is None else arms:
      _check(where, arm, value, ", or None" * optional)
  elif isinstance(value, Mapping):
    for key, element in value.items():
      _check(f"{where}[{key!r}]", arms[-1], element)
  elif isinstance(value, tuple | list) and arms:
    repeated = origin is not tuple or arms[-1] is Ellipsis
    kinds = arms[:1] * len(value) if repeated else arms
    for i, pair in enumerate(zip(kinds, value, strict=False)):
      _check(f"{where}[{i}]", *pair)


def _number(bound: Range | Choice, value: Any) -> str:
  """Returns what a value lacks to be compared with a bound, for the error."""
  if isinstance(bound, Choice):
    return ""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return "a number, "
  return "" if math.isfinite(value) else "a finite number, "
