"""A flag that chooses what a command does, and the options of each choice.

Of `--op=ties --density=0.5` the first flag chooses; the second is an option,
which other choices may not take. A choice is a frozen dataclass whose fields
are its options: name, type, default, help and bounds stand there and nowhere
else. From a table of choices follow the flags, their help, the refusal of
options that a choice does not take, and the value that the command runs:

    OPERATIONS = Choices("op", "What to do.", {
      "ties": Choice(Combine, fixed={"how": "ties"}, unused={"rank"}),
      "lora": Choice(ToLora),
    })
    OPERATIONS.define(FLAGS)
    OPERATIONS.chosen(FLAGS).run()
"""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any

from absl import flags

from experiments.core import cli, flags_from
from research.errors import UserError
from research.io import settings


def option(
  default: Any,
  help: str,
  *,
  flag: str | None = None,
  least: int | float | None = None,
  required: bool = False,
  needs: str | None = None,
) -> Any:
  """Returns a field for an option: a `settings.setting` of some choices.

  Args:
    default, help, flag, least: see `settings.setting`.
    required: whether the flag must have a value.
    needs: another option without which (at its default) this has no effect.
  """
  field = settings.setting(default, help, flag=flag, least=least)
  more = dict(required=required, needs=needs)
  return dataclasses.field(default=default, metadata={**field.metadata, **more})


def argument(name: str, *values: str) -> Any:
  """Returns a field for what may stand behind the choice and a colon.

  Args:
    values: that it may have; none for any, which the dataclass checks.
  """
  return dataclasses.field(
    default=None, metadata=dict(argument=name, values=values)
  )


@dataclasses.dataclass(frozen=True)
class Choice:
  """A value of the flag that chooses.

  Attributes:
    build: a frozen dataclass with `option`s; the first paragraph of its
      docstring is the help of this choice.
    fixed: fields that the choice itself sets.
    unused: options of `build` that have no effect on this choice.
  """

  build: type
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unused: Set[str] = frozenset()

  @property
  def options(self) -> dict[str, dataclasses.Field]:
    """The options that it takes, by flag."""
    fields = {field.name: field for field in dataclasses.fields(self.build)}
    return {
      flag: fields[name]
      for name, flag in flags_from.names(self.build).items()
      if name not in self.unused
    }

  @property
  def argument(self) -> dataclasses.Field | None:
    """The field for what stands behind a colon."""
    found = [
      f for f in dataclasses.fields(self.build) if "argument" in f.metadata
    ]
    return found[0] if found else None

  @property
  def arguments(self) -> tuple[str, ...]:
    """What may stand behind a colon; of what may be any text, its name."""
    if self.argument is None:
      return ()
    about = self.argument.metadata
    return about["values"] or (about["argument"],)

  def takes(self, text: str) -> bool:
    """Whether `text` may stand behind the choice and a colon."""
    if self.argument is None or not text:
      return False
    values = self.argument.metadata["values"]
    return not values or text in values

  @property
  def about(self) -> str:
    """What it does, in a sentence."""
    return " ".join((self.build.__doc__ or "").split("\n\n")[0].split())


@dataclasses.dataclass(frozen=True)
class Choices:
  """The flag that chooses, and what there is to choose from.

  Attributes:
    table: value of the flag -> choice.
  """

  flag: str
  help: str
  table: Mapping[str, Choice]

  def define(self, values: flags.FlagValues) -> None:
    """Defines the flag and the options of all choices."""
    flags.DEFINE_string(self.flag, None, self.describe(), flag_values=values)
    options = [name for c in self.table.values() for name in c.options]
    for name in dict.fromkeys(options):
      self._define_option(values, name)

  def describe(self) -> str:
    """Returns the flag's help, a paragraph for each kind of choice."""
    kinds: dict[str, list[str]] = {}
    for name, choice in self.table.items():
      behind = "|".join(choice.arguments)
      spelled = f"{name}[:{behind}]" if behind else name
      kinds.setdefault(choice.about, []).append(spelled)
    found = [f"{', '.join(names)}: {text}" for text, names in kinds.items()]
    return "\n\n".join([self.help, *found])

  def owners(self, option: str) -> list[str]:
    return [name for name, c in self.table.items() if option in c.options]

  def chosen(self, values: flags.FlagValues) -> Any:
    """Returns the dataclass that parsed flags choose.

    Raises:
      UserError: the choice is none, or is missing; an option that it requires
        is missing; an option was given that it does not take.
    """
    given = values[self.flag].value
    cli.required(**{self.flag: given})
    name, colon, text = given.partition(":")
    choice = self.table.get(name)
    if choice is None or (colon and not choice.takes(text)):
      raise UserError(
        f"--{self.flag}={given}: expected one of {', '.join(self._known())}"
      )
    for option in values:
      owners = self.owners(option)
      if owners and name not in owners and values[option].present:
        raise UserError(
          f"--{option}: is for --{self.flag}={', '.join(owners)}, found "
          f"--{self.flag}={name}; leave it out"
        )
    built = dict(choice.fixed)
    if choice.argument is not None:
      built[choice.argument.name] = text or None
    for option, field in choice.options.items():
      if field.metadata["required"]:
        cli.required(**{option: values[option].value or None})
      _check_needs(values, option, choice.options)
      if values[option].present:
        built[field.name] = flags_from.flag_value(field, values)
    return choice.build(**built)

  def _known(self) -> Iterator[str]:
    """Yields all values of the flag, those behind a colon last."""
    yield from self.table
    for name, choice in self.table.items():
      yield from (f"{name}:{value}" for value in choice.arguments)

  def _define_option(self, values: flags.FlagValues, option: str) -> None:
    """Defines one flag; choices may differ in its help and in its default."""
    owners = self.owners(option)
    groups: dict[tuple[str, Any], list[str]] = {}
    for name in owners:
      field = self.table[name].options[option]
      key = (field.metadata["help"], field.default)
      groups.setdefault(key, []).append(name)
    defaults = {default for _, default in groups}
    sentences = []
    for (text, default), names in groups.items():
      if len(defaults) > 1 and default is not None:
        text += f" By default {default}."
      if len(groups) > 1:
        text = f"For {_listed(names)}: {text}"
      sentences.append(text)
    others = [name for name in self.table if name not in owners]
    if others and len(groups) == 1:
      which = f"Not for {_listed(others)}."
      if len(owners) <= len(others):
        which = f"For {_listed(owners)}."
      sentences.append(which)
    field = self.table[owners[0]].options[option]
    default = field.default if len(defaults) == 1 else None
    help = " ".join(sentences)
    flags_from.define_flag(field, option, default, help, values)


def _listed(names: list[str]) -> str:
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _check_needs(
  values: flags.FlagValues,
  option: str,
  options: Mapping[str, dataclasses.Field],
) -> None:
  """Raises UserError for an option that another one leaves without effect."""
  other = options[option].metadata["needs"]
  if other is None or not values[option].present:
    return
  value = values[other].value
  if value == options[other].default:
    raise UserError(
      f"--{option}: is for --{other}, which is missing"
      if value is None
      else f"--{option}: has no effect with --{other}={value}; leave it out"
    )
