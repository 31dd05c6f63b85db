"""Bindings of the command line: `--set=NAME=VALUE`, as gin reads them.

Each must change something: one that nothing uses is an error, and one that
another binding wins over in places is warned of.
"""

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research import moved
from research.io import folders
from research.typing import UserError

MACRO = "gin.macro"
"""Gin's name of what holds the value of a macro; its scope is the name."""

Record = Mapping[tuple[str, str], Mapping[str, Any]]
"""(scope, configurable) -> values by parameter, as gin keeps them."""

Bound = Iterable[tuple[tuple[str, str], Mapping[str, Any]]]
"""Items of records."""


def from_flag(line: str) -> str:
  """Returns a line of the command line as gin reads it.

  A shell takes quotes away, and gin knows no bare words: a value that is
  neither Python's nor gin's own is a text, so FILES=a.jsonl needs no quotes.
  """
  found = re.fullmatch(r"(\s*[\w./]+\s*=\s*)(\S.*)", line, re.DOTALL)
  if not found:
    raise UserError(
      f"--set={line}: expected NAME=VALUE, e.g. --set=STEPS=20 or "
      "--set=lora.LoRA.rank=16."
    )
  name, value = found.groups()
  if _is_unfinished(value):
    raise UserError(
      f"--set={line}: found a bracket or quote that does not end, expected a"
      " whole value."
    )
  return moved.binding(name + _value(value.strip()))


def _is_unfinished(text: str) -> bool:
  """Whether a value begins with a bracket or quote, and one does not end."""
  if text[0] not in "([{'\"":
    return False
  try:
    list(tokenize.generate_tokens(io.StringIO(text).readline))
  except (tokenize.TokenError, SyntaxError):
    return True
  return False


def _value(text: str) -> str:
  """Returns the value that `text` says, with gin's quotes and brackets."""
  if text[0] in "@%":
    return text
  try:
    found = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text if text[0] in "([{'\"" else repr(text)
  bare = isinstance(found, tuple) and text[0] != "("
  return f"({text})" if bare else text


def check_used(
  lines: Sequence[str],
  *records: Record,
  stages: Sequence[str] = (),
  theirs: Record | None = None,
) -> None:
  """Warns of bindings that have no effect in some places of a run.

  Args:
    lines: of the command line; those of a stage are left to its own check.
    records: the bindings that a run used, by the scope in which they are bound.
    stages: names of the run's stages, which are scopes, too.
    theirs: the bindings of those scopes.

  Raises:
    UserError: a binding has no effect at all.
  """
  used = [pair for record in records for pair in record.items()]
  macros = _macros(used)
  names = [line.split("=")[0].strip() for line in lines]
  of_a_stage = tuple(f"{stage}/" for stage in stages)
  for line, name in zip(lines, names, strict=True):
    if line.startswith(of_a_stage):
      continue
    scope, _, target = name.rpartition("/")
    own = _of_stages(name, stages, theirs or {})
    if "." not in target:
      places, reached = [], name in macros
    else:
      places = _scopes(target, used)
      reached = scope in places
      if not scope:
        own += [_joined(x, name) for x in set(places) - {scope}]
    kept = sorted(x for x in own if x not in names)
    if reached and kept:
      folders.warn(
        f"--set={line}: {', '.join(kept[:3])} has a value of its own, which"
        " stays; set that, too"
      )
    if not reached:
      raise UserError(
        f"--set={line}: nothing in this run uses it; "
        + _instead(name, sorted(set(places)), macros)
        + (f"; stages: {', '.join(stages)}" if stages and scope else "")
      )


def _of_stages(name: str, stages: Sequence[str], theirs: Record) -> list[str]:
  """Returns a binding's name in each stage that has a value of its own."""
  scope, _, target = name.rpartition("/")
  if "." in target:
    places, own = _scopes(target, theirs.items()), scope
  else:
    places, own = _macros(theirs.items()), name
  return [
    f"{stage}/{name}"
    for stage in stages
    if f"{stage}/{own}".rstrip("/") in places
  ]


def _scopes(target: str, used: Bound) -> list[str]:
  """Returns the scopes in which a parameter is bound."""
  target, _, parameter = target.rpartition(".")
  return [
    scope
    for (scope, selector), values in used
    if selector.endswith(target) and parameter in values
  ]


def _macros(used: Bound) -> list[str]:
  """Returns the names of macros, which gin has as scopes."""
  return sorted({scope for (scope, name), _ in used if name == MACRO})


def _joined(scope: str, name: str) -> str:
  """Returns the name of a parameter in another scope."""
  return f"{scope}/{name.rpartition('/')[2]}".lstrip("/")


def _instead(name: str, places: Sequence[str], macros: Sequence[str]) -> str:
  """Returns what to bind instead of `name`.

  Args:
    name: of a macro, or `scope/module.Class.parameter`.
    places: scopes in which the parameter is bound.
    macros: that are used.
  """
  if places:
    own = [_joined(place, name) for place in places]
    return f"did you mean {' or '.join(own[:3])}?"
  near = difflib.get_close_matches(name, macros, 1)
  return f"did you mean {near[0]}?" if near else f"macros: {macros}"
