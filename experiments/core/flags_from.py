"""Absl flags of a dataclass of settings: one field, one flag, one help text.

  flags_from.define(Config, FLAGS)
  config = flags_from.build(Config, FLAGS)

fancyflags nests the names of flags, and etils, simple_parsing and tyro parse by
argparse: none defines flat absl flags, hence these lines.
"""

import contextlib
import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from research.errors import UserError

_DEFINE = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
  tuple[str, ...]: flags.DEFINE_multi_string,
  tuple[float, ...]: flags.DEFINE_multi_float,
}


def names(config: type) -> dict[str, str]:
  """Returns the flag of each field of `config` that has one, by field."""
  return {
    field.name: field.metadata["flag"] or field.name
    for field in _settings(config)
  }


def define(config: type, values: flags.FlagValues, before: str = "") -> None:
  """Defines a flag for each `research.io.settings.setting` of a dataclass.

  One that is there already stays: a command may share it with other settings.
  """
  for field in _settings(config):
    name = field.metadata["flag"] or field.name
    if name not in values:
      help = before + flag_form(config, field.metadata["help"])
      define_flag(field, name, field.default, help, values)


def build(config: type, values: flags.FlagValues, **more: Any) -> Any:
  """Returns the dataclass that flags describe.

  Raises:
    UserError: a text is not understood, or the dataclass refuses a value; what
      it calls a setting is called by its flag here.
  """
  given = {
    field.name: flag_value(field, values)
    for field in _settings(config)
    if field.name not in more
  }
  with errors_name_flags(config):
    return config(**given, **more)


@contextlib.contextmanager
def errors_name_flags(config: type) -> Iterator[None]:
  """Raises a UserError about settings of `config` as one about their flags."""
  try:
    yield
  except UserError as error:
    raise UserError(flag_form(config, str(error))) from error


def flag_form(config: type, text: str) -> str:
  """Returns a text about settings as one about their flags.

  `` `name` `` and `name=` become `--flag` and `--flag=`; what stands behind a
  comma is a part of a value, and stays.
  """
  known = names(config)
  text = re.sub(
    r"`(\w+)`", lambda m: f"--{known[m[1]]}" if m[1] in known else m[0], text
  )
  return re.sub(
    r"(?<![\w,.-])(\w+)=(?=\S)",
    lambda m: f"--{known[m[1]]}=" if m[1] in known else m[0],
    text,
  )


def _settings(config: type) -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(config) if "help" in f.metadata]


def define_flag(
  field: dataclasses.Field,
  name: str,
  default: Any,
  help: str,
  values: flags.FlagValues,
) -> None:
  """Defines one flag of the field's type and bounds."""
  from research.io import settings

  about = field.metadata
  kind = settings.base_type(field)
  if about["forms"] is not None:
    kind, default = str, about["forms"].text(default)
  if typing.get_origin(kind) is typing.Literal:
    words = list(typing.get_args(kind))
    flags.DEFINE_enum(name, default, words, help, flag_values=values)
    return
  more = {}
  if kind in (int, float):
    more = dict(lower_bound=about["least"], upper_bound=about["most"])
  if typing.get_origin(kind) is tuple:
    default = list(default)
  _DEFINE[kind](name, default, help, flag_values=values, **more)


def flag_value(field: dataclasses.Field, values: flags.FlagValues) -> Any:
  """Returns what a field's flag says, a text with structure as its value."""
  name, forms = field.metadata["flag"] or field.name, field.metadata["forms"]
  value = values[name].value
  if isinstance(value, list):
    return tuple(value)
  if forms is None:
    return value
  try:
    return forms.parse(value)
  except UserError as error:
    raise UserError(f"--{name}={value}: {error}") from error
