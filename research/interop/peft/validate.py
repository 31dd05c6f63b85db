"""Rules of an adapter_config.json that do not do what they seem to.

research/lora/MATH.md 7.3. PEFT takes the first pattern that matches; but it
sorts patterns when it saves, so overlapping ones can mean something else after
a save and a load. Where a rule matches nothing, it warns if that is a pattern
or excludes, and says nothing of a name among targets; `warn` does of all of
them.
"""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from research.interop.peft import config as peft_config
from research.interop.peft.targets import (
  Names,
  Targets,
  by_pattern,
  is_saved,
  not_adapted,
)
from research.io.fields import Fields
from research.lora import methods

_PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One rule that is not as it seems.

  Attributes:
    kind: it matches nothing; it overlaps another one; the order of the
      overlapping ones matters and is lost on saving; it keeps away adapters
      that another rule asks for; it is no regular expression.
    field, rule: which.
    text: for people.
  """

  kind: Literal["nothing", "overlap", "order", "hidden", "invalid"]
  field: str
  rule: str
  text: str


def findings(
  config: Mapping[str, Any],
  modules: Sequence[str],
  all_modules: Sequence[str] = (),
  parameters: Sequence[str] = (),
) -> list[Finding]:
  """Returns what is wrong with the rules of a configuration.

  Args:
    all_modules: names of all of its modules, norms included.
    parameters: names of those that target_parameters adapts.
  """
  # As in a file, where there are no tuples.
  values = {
    k: list(x) if isinstance(x, tuple) else x for k, x in config.items()
  }
  fields = Fields(values, peft_config.CONFIG)
  targets = peft_config.read_targets(fields)
  to_save = tuple(peft_config.read_names(fields, "modules_to_save") or ())
  out = [*_invalid(fields)]
  if out:
    return out
  chosen = [m for m in modules if targets.match(m)]
  adapted = [m for m in chosen if not not_adapted(m, to_save)]
  adapted += parameters
  out += _unused(targets, to_save, modules, [*modules, *all_modules])
  for name in to_save:
    hidden = [m for m in chosen if not_adapted(m, (name,))]
    if hidden:
      text = f"keeps adapters off {_few(hidden)}, which targets match"
      out.append(Finding("hidden", "modules_to_save", name, text))
  for field in _fields(config):
    out += _patterns(field, _pattern(fields, field), adapted)
  return out


def warn(
  config: Mapping[str, Any],
  where: Any,
  modules: Sequence[str],
  all_modules: Sequence[str] = (),
  parameters: Sequence[str] = (),
) -> None:
  """Warns of each rule that matches nothing, as PEFT does on loading."""
  for found in findings(config, modules, all_modules, parameters):
    if found.kind == "nothing":
      text = f"{where}: {found.field}: {found.rule!r} {found.text}"
      warnings.warn(text, RuntimeWarning, stacklevel=3)


def _fields(config: Mapping[str, Any]) -> Sequence[str]:
  kinds = methods.of_peft_type(str(config.get("peft_type")))
  theirs = {field for kind in kinds for field in kind.PEFT_PATTERNS.values()}
  return [f for f in _PATTERNS if f in theirs or not kinds]


def _pattern(fields: Fields, name: str) -> Mapping[str, Any]:
  inner = fields.object(name)
  return inner.values if inner else {}


def _invalid(fields: Fields) -> Iterator[Finding]:
  rules = [(f, k) for f in _fields(fields.values) for k in _pattern(fields, f)]
  for field in ("target_modules", "exclude_modules"):
    if isinstance(fields.get(field), str):
      rules.append((field, fields.get(field)))
  for field, rule in rules:
    try:
      re.compile(rule)
    except re.error as e:
      text = f"is not a regular expression: {e}"
      yield Finding("invalid", field, rule, text)


def _unused(
  targets: Targets,
  to_save: Sequence[str],
  modules: Sequence[str],
  all_modules: Sequence[str],
) -> Iterator[Finding]:
  def rules(names: Names) -> Sequence[str]:
    return (
      () if names is None else (names,) if isinstance(names, str) else names
    )

  # A name from a list keeps being one; a regular expression stays one.
  for field, names in (
    ("target_modules", targets.target),
    ("exclude_modules", targets.exclude),
  ):
    for rule in rules(names):
      alone = Targets(rule if isinstance(names, str) else (rule,))
      if not any(alone.match(m) for m in modules):
        yield Finding("nothing", field, rule, "matches no module of the base")
  everywhere = dataclasses.replace(targets, exclude=None)
  for i in targets.layers or ():
    there = dataclasses.replace(everywhere, layers=(i,))
    if not any(there.match(m) for m in modules):
      text = "no module that targets match is in such a layer"
      yield Finding("nothing", "layers_to_transform", str(i), text)
  for name in to_save:
    if not any(is_saved(m, (name,)) for m in all_modules):
      yield Finding(
        "nothing", "modules_to_save", name, "matches no module of the base"
      )


def _patterns(
  field: str, patterns: Mapping[str, Any], adapted: Sequence[str]
) -> Iterator[Finding]:
  hits = {
    key: {m for m in adapted if by_pattern(m, {key: True}, False, field)}
    for key in patterns
  }
  for key, found in hits.items():
    if not found:
      yield Finding("nothing", field, key, "matches no adapted module")
  for one, two in itertools.combinations(patterns, 2):
    both = sorted(hits[one] & hits[two])
    if not both:
      continue
    if one <= two or patterns[one] == patterns[two]:
      text = f"also matched by {two!r}: {_few(both)}; the first one counts"
      yield Finding("overlap", field, one, text)
    else:
      text = (
        f"gives {_few(both)} {patterns[one]!r}, but {two!r} comes first once "
        f"the file is saved, and gives {patterns[two]!r}"
      )
      yield Finding("order", field, one, text)


def _few(names: Sequence[str]) -> str:
  more = f" and {len(names) - 2} more" if len(names) > 2 else ""
  return ", ".join(names[:2]) + more
