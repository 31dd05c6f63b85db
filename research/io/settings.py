"""Settings: fields of a frozen dataclass that commands make flags of.

A field made by `setting` carries its help and its bounds;
`experiments.core.flags_from` derives a flag from it. A value with structure is
a dataclass of a union, and `Forms` names the union's members for texts:

  name[:first][,field=value]..     threshold:0.9    cap:0.1,start=0.6

`first` is the dataclass's first field. So a field that a member gains can be
spelled at once, and what a text may say is what its dataclass has.

A message or a help that means a setting writes `` `name` `` or `name=value`,
which a command turns into its flag.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from research.errors import UserError


def setting(
  default: Any,
  help: str,
  *,
  flag: str | None = None,
  least: int | float | None = None,
  most: int | float | None = None,
  forms: "Forms | None" = None,
) -> Any:
  """Returns a dataclass field with what a command has to know of it.

  Args:
    default: of the field.
    help: what the setting does.
    flag: its name on the command line; by default the field's.
    least, most: bounds of a number, both allowed.
    forms: how texts spell it, if it has structure.
  """
  known = dict(help=help, flag=flag, least=least, most=most, forms=forms)
  return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class Form:
  """How texts spell one dataclass of a union.

  Attributes:
    name: what the text begins with.
    kind: the dataclass; None where the name stands for None.
    fixed: fields that the name alone decides about.
  """

  name: str
  kind: type | None
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def fields(self) -> list[dataclasses.Field]:
    """Returns the fields that a text may give, the first one behind a colon."""
    if self.kind is None:
      return []
    return [
      field
      for field in dataclasses.fields(self.kind)
      if field.init and field.name not in self.fixed
    ]

  @property
  def usage(self) -> str:
    """Returns what such texts look like, e.g. `cap:ETA[,start=START]`."""
    out = self.name
    for i, field in enumerate(self.fields):
      value = field.name.upper()
      said = f",{field.name}={value}" if i else f":{value}"
      out += said if _required(field) else f"[{said}]"
    return out

  def build(self, first: str | None, named: Mapping[str, str]) -> Any:
    """Returns the value.

    Args:
      first: what stood behind the colon, None without one.
      named: the other fields, as they were given.

    Raises:
      UserError: a field is unknown, missing or not of its type, or what the
        dataclass itself raises.
    """
    fields = {field.name: field for field in self.fields}
    head, *others = fields or [None]
    for name in named:
      if name not in others:
        expected = " or ".join(others) or "nothing"
        raise UserError(f"found {name}=, expected {expected}")
    if first is not None and head is None:
      raise UserError(f"found :{first}, expected {self.name} alone")
    texts = dict(named) if first is None else {head: first, **named}
    if any(_required(fields[name]) for name in fields.keys() - texts.keys()):
      raise UserError(f"expected {self.usage}")
    values = {name: _value(fields[name], x) for name, x in texts.items()}
    return None if self.kind is None else self.kind(**self.fixed, **values)

  def matches(self, value: Any) -> bool:
    """Whether this is how `value` is spelled."""
    if self.kind is None or type(value) is not self.kind:
      return value is None and self.kind is None
    return all(getattr(value, name) == x for name, x in self.fixed.items())

  def text(self, value: Any) -> str:
    """Returns the text of a value that matches, without needless fields."""
    out = self.name
    for i, field in enumerate(self.fields):
      own = getattr(value, field.name)
      if i == 0 and own is not None:
        out += f":{_plain(own)}"
      elif i and (_required(field) or own != field.default):
        out += f",{field.name}={_plain(own)}"
    return out


@dataclasses.dataclass(frozen=True)
class Forms:
  """All texts of a setting.

  Attributes:
    members: a form for each name.
  """

  members: tuple[Form, ...]

  @property
  def usage(self) -> str:
    """Returns what texts may look like, in a sentence."""
    *most, last = [form.usage for form in self.members]
    return f"{', '.join(most)} or {last}" if most else last

  def parse(self, text: str) -> Any:
    """Returns what a text stands for.

    Raises:
      UserError: it stands for nothing; the message says what was expected, and
        leaves it to the caller to say of what.
    """
    head, *rest = text.split(",")
    name, colon, first = head.partition(":")
    parts = [part.partition("=") for part in rest]
    named = {field: value for field, _, value in parts}
    form = {form.name: form for form in self.members}.get(name)
    whole = all(equals for _, equals, _ in parts) and len(named) == len(parts)
    if form is None or not whole:
      raise UserError(f"expected {self.usage}")
    return form.build(first if colon else None, named)

  def text(self, value: Any) -> str:
    """Returns how texts spell a value; its `repr` if they cannot."""
    for form in self.members:
      if form.matches(value):
        return form.text(value)
    return repr(value)


def show(config: Any, name: str) -> str:
  """Returns `name=value` of a setting, for messages."""
  [field] = [f for f in dataclasses.fields(config) if f.name == name]
  value, forms = getattr(config, name), field.metadata["forms"]
  return f"{name}={value if forms is None else forms.text(value)}"


def check(config: Any) -> None:
  """Raises UserError for a setting beyond its bounds, or none of its words."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if "help" not in field.metadata or value is None:
      continue
    kind, expected = base_type(field), None
    if typing.get_origin(kind) is typing.Literal:
      words = typing.get_args(kind)
      if value not in words:
        expected = f"{', '.join(words[:-1])} or {words[-1]}"
    elif not _within(field, value):
      expected = _bounds(field)
    if expected is not None:
      raise UserError(f"{show(config, field.name)}: expected {expected}")


def _within(field: dataclasses.Field, value: Any) -> bool:
  least, most = field.metadata["least"], field.metadata["most"]
  return (least is None and most is None) or (
    math.isfinite(value)
    and (least is None or value >= least)
    and (most is None or value <= most)
  )


def _bounds(field: dataclasses.Field) -> str:
  least, most = field.metadata["least"], field.metadata["most"]
  a = "a whole number" if base_type(field) is int else "a number"
  if most is None:
    return f"{a} of at least {least}"
  return (
    f"{a} of at most {most}" if least is None else f"{a} from {least} to {most}"
  )


def base_type(field: dataclasses.Field) -> Any:
  """Returns a field's type, without its range and the None it may also be."""
  kind = field.type
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    kinds = [x for x in typing.get_args(kind) if x is not type(None)]
    kind = kinds[0] if len(kinds) == 1 else kind
  if typing.get_origin(kind) is typing.Annotated:
    kind = kind.__origin__
  return float if kind == float | int else kind


def _required(field: dataclasses.Field) -> bool:
  nothing = dataclasses.MISSING
  return field.default is nothing and field.default_factory is nothing


def _value(field: dataclasses.Field, text: str) -> Any:
  """Returns a number, or one of a few words, as the field's type has it."""
  kind = base_type(field)
  if kind is int:
    value = int(text) if re.fullmatch("[0-9]{1,6}", text) else None
    expected = "a whole number"
  elif kind is float:
    value, expected = _number(text), "a number"
  else:
    words = typing.get_args(kind)
    value, expected = (text if text in words else None), " or ".join(words)
  if value is None:
    raise UserError(f"{field.name} is {text!r}, expected {expected}")
  return value


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _plain(value: Any) -> str:
  return repr(value).removesuffix(".0") if type(value) is float else str(value)
