"""Parts of a study as run files list them: fields by name, systems by title."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from research.typing import UserError

NAMED = {"named": True}
"""Metadata of a field whose texts are names of systems."""


def from_mapping(of: type, fields: Any) -> Any:
  """Returns a dataclass from its fields by name, as run files list them.

  Raises:
    UserError: it has no such field, or one is missing.
  """
  if isinstance(fields, of):
    return fields
  names = [f.name for f in dataclasses.fields(of)]
  for name in fields:
    if name not in names:
      raise UserError(
        f"{of.__name__}: found the field {name!r}, expected some of"
        f" {_listed(names, name)}"
      )
  try:
    return of(**fields)
  except TypeError as error:
    raise UserError(f"{of.__name__} {dict(fields)}: {error}") from error


def set_parts(study: Any, **kinds: type) -> None:
  """Sets fields of a frozen dataclass to what `from_mapping` makes of them."""
  for field, of in kinds.items():
    part = getattr(study, field)
    several = isinstance(part, tuple | list)
    made = [from_mapping(of, x) for x in (part if several else [part])]
    object.__setattr__(study, field, tuple(made) if several else made[0])


def _listed(names: Collection[str], wrong: str) -> str:
  """Returns names as text, and which one may have been meant."""
  near = difflib.get_close_matches(wrong, names, 1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return ", ".join(names) + hint


def with_systems(
  part: Any, systems: Mapping[str, Any], named: bool = False
) -> Any:
  """Returns a part with systems in place of their names.

  Args:
    part: a dataclass, or several; in fields of `NAMED`, texts are names.
    named: whether the texts of `part` itself are names.

  Raises:
    UserError: there is no such system.
  """
  if isinstance(part, str) and named:
    if part in systems:
      return systems[part]
    raise UserError(
      f"Pipeline: found a system of the step {part!r}, expected one of"
      f" {_listed(systems, part)}"
    )
  if isinstance(part, tuple | list):
    return tuple(with_systems(x, systems, named) for x in part)
  if not dataclasses.is_dataclass(part) or part in systems.values():
    return part
  fields = {
    f.name: with_systems(
      getattr(part, f.name), systems, bool(f.metadata.get("named"))
    )
    for f in dataclasses.fields(part)
  }
  return dataclasses.replace(part, **fields)
