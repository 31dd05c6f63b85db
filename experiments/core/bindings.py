"""Bindings of the command line and of run files, as gin reads them.

Each must change something: one that nothing uses is an error, and one that
another binding wins over in places is warned of.
"""

import ast
import difflib
import glob
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.interop import packages
from research.io import folders

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
"""Beside the package, in a checkout and in an installation alike."""

_FOLDERS = {"config": "runs", "sweep": "sweeps", "verifier": "runs"}

MACRO = "gin.macro"
"""Gin's name of what holds the value of a macro; its scope is the name."""

Record = Mapping[tuple[str, str], Mapping[str, Any]]
"""(scope, configurable) -> values by parameter, as gin keeps them."""

Bound = Iterable[tuple[tuple[str, str], Mapping[str, Any]]]
"""Items of records."""


def find(
  path: str, flag: str = "config", folder: pathlib.Path | None = None
) -> pathlib.Path:
  """Returns the gin file named `path`.

  Args:
    path: absolute, or relative to the working directory, to `folder`, or to
      `configs/`.
    flag: the flag that named it, for the error: `config` or `sweep`.
    folder: of the file that includes it, if that is not one of ours.
  """
  for place in (pathlib.Path(), *places(folder)):
    if (place / path).is_file():
      return (place / path).resolve()
  if any((place / path).is_dir() for place in (pathlib.Path(), CONFIGS)):
    raise UserError(
      f"--{flag}={path}: is a directory, expected a gin file, e.g. one of those"
      f" in {CONFIGS / _FOLDERS[flag]}."
    )
  raise UserError(
    f"--{flag}={path}: no such file, neither here nor under configs/.\n"
    f"{_nearest(path, _FOLDERS[flag])}"
  )


def places(folder: pathlib.Path | None) -> tuple[pathlib.Path, ...]:
  """Returns where included files are, besides the working directory."""
  ours = folder is None or folder.is_relative_to(CONFIGS)
  return (CONFIGS,) if ours else (folder, CONFIGS)


def _nearest(path: str, folder: str) -> str:
  """Returns a sentence that names the files of `folder` most like `path`."""
  asked = re.sub(rf"^(configs/)?({folder}/)?|\.gin$", "", path)

  def likeness(name: str) -> float:
    own = name.removeprefix(f"{folder}/").removesuffix(".gin")
    last, stem = own.split("/")[-1], asked.split("/")[-1]
    if stem and stem in last:
      return 1 + len(stem) / len(last)
    pairs = (asked, own), (stem, last)
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

  files = CONFIGS.glob(f"{folder}/**/*.gin")
  names = sorted(file.relative_to(CONFIGS).as_posix() for file in files)
  near = [name for name in names if likeness(name) > 0.6]
  near = sorted(near, key=likeness, reverse=True)[:3]
  hint = f"Did you mean {' or '.join(near)}? " if near else ""
  return f"{hint}All of them are in {CONFIGS / folder}."


def check_text(
  path: str, lines: Sequence[str] = (), flag: str = "config"
) -> None:
  """Refuses what a run file's text shows to be wrong, before it is built.

  Building it imports all that it configures. What is refused here would be
  refused then, in the same words: a file that is missing, a macro that no file
  has, a model, a file of data or a run that is set and is not there.

  Args:
    path, flag: see `find`.
    lines: bindings of the command line.
  """
  text = whole_text(find(path, flag))
  bound = re.findall(r"^([\w./]+)[ \t]*=[ \t]*([^\n#]*)", text, re.MULTILINE)
  names = {name for name, _ in bound}
  macros = {x.rpartition("/")[2] for x in names if "." not in x}
  macros |= set(re.findall(r"%(?!gin\b)(\w+)", text))
  for line in from_flags(lines):
    name, _, value = line.partition("=")
    target = name.strip().rpartition("/")[2]
    if "." not in target and target not in macros:
      paths = [x for x in names if "." in x]
      raise UserError(
        f"{path}: --set={line}: nothing in this run uses it; "
        + _nearest_name(target, sorted(macros), paths)
      )
    uses = [x for x, y in bound if y.strip() == f"%{target}"]
    for field in (target, *uses):
      _check_value(field.rpartition("/")[2], line, value.strip())


def whole_text(file: pathlib.Path) -> str:
  """Returns a gin file's text behind those of the files that it includes."""
  try:
    text = file.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: not a readable UTF-8 file: {error}") from error
  files = [find(x, folder=file.parent) for x in included(text)]
  return "\n".join([*(whole_text(x) for x in files if x != file), text])


def included(text: str) -> list[str]:
  """Returns the paths of the files that a gin file includes."""
  return re.findall(r"^include\s+['\"](.+)['\"]", text, re.MULTILINE)


def _check_value(field: str, line: str, value: str) -> None:
  """Refuses a path or a model's name that stands for nothing.

  Args:
    field: `module.Class.field`, which has the value.
    line: of the command line, for the error.
    value: as gin reads it; what is no text stays for gin.
  """
  try:
    literal = ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return
  texts = literal if isinstance(literal, (list, tuple)) else (literal,)
  if not all(isinstance(x, str) for x in texts):
    return
  if field == "experiment.Pretrained.name":
    packages.check_name(*texts)
  elif field.startswith(("trained.", "verifiers.")) and field.endswith(
    ".workdir"
  ):
    for text in texts:
      if "://" not in text and not os.path.isdir(text):
        raise UserError(
          f"--set={line}: no such directory, expected that of a run of"
          " experiments.train"
        )
  elif field.startswith(("records.", "sources.TextFiles.", "text_records.")):
    for text in texts if field.endswith(".paths") else ():
      if not os.path.exists(text) and glob.escape(text) == text:
        raise UserError(
          f"{text}: cannot be read (No such file or directory).\n"
          f"Expected a file, from --set={line}; check the path."
        )


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
  return name + _value(value.strip())


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


def from_flags(lines: Sequence[str]) -> list[str]:
  """Returns lines of the command line as gin reads them, see `from_flag`.

  Raises:
    UserError: a line is none, or two of them bind one name.
  """
  bound: dict[str, str] = {}
  for line in map(from_flag, lines):
    if (name := name_of(line)) in bound:
      raise UserError(
        f"--set={line}: is there twice, also as --set={bound[name]}; leave one"
        " of them out."
      )
    bound[name] = line
  return list(bound.values())


def name_of(line: str) -> str:
  """Returns what a line binds: a macro, or `scope/module.Class.parameter`."""
  return line.split("=")[0].strip()


def names_in(text: str) -> list[str]:
  """Returns what a gin file binds, without the files that it includes."""
  return re.findall(r"^([\w./]+)[ \t]*=", text, re.MULTILINE)


def unreferenced(text: str) -> list[str]:
  """Returns macros and scoped fields of a gin file that it refers to nowhere.

  They are meant for what it includes. One that it refers to, and fields without
  a scope, may wait there for a value of the command line.
  """

  def waits(name: str) -> bool:
    scope, _, target = name.rpartition("/")
    if "." in target:
      return not scope or f"@{scope}/" in text
    return re.search(rf"%{re.escape(name)}\b", text) is not None

  return [name for name in names_in(text) if not waits(name)]


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
  for line, instead in unused(lines, *records, stages=stages):
    raise UserError(f"--set={line}: nothing in this run uses it; {instead}")
  used = [pair for record in records for pair in record.items()]
  names = [name_of(line) for line in lines]
  for line, name in zip(lines, names, strict=True):
    if line.startswith(_prefixes(stages)):
      continue
    scope, _, target = name.rpartition("/")
    own = _of_stages(name, stages, theirs or {})
    if "." in target and not scope:
      own += [_joined(x, name) for x in set(_scopes(target, used)) - {scope}]
    if kept := sorted(x for x in own if x not in names):
      folders.warn(
        f"--set={line}: {', '.join(kept[:3])} has a value of its own, which"
        " stays; set that, too"
      )


def unused(
  lines: Sequence[str], *records: Record, stages: Sequence[str] = ()
) -> list[tuple[str, str]]:
  """Returns lines that have no effect, each with what to bind instead.

  Args:
    lines: bindings, or names alone.
    records, stages: see `check_used`.
  """
  used = [pair for record in records for pair in record.items()]
  macros, without_effect = _macros(used), []
  for line in lines:
    name = name_of(line)
    scope, _, target = name.rpartition("/")
    places = _scopes(target, used) if "." in target else []
    reached = scope in places if "." in target else name in macros
    if not reached and not line.startswith(_prefixes(stages)):
      instead = _instead(name, sorted(set(places)), used)
      if stages and scope:
        instead += f"; stages: {', '.join(stages)}"
      without_effect.append((line, instead))
  return without_effect


def _prefixes(stages: Sequence[str]) -> tuple[str, ...]:
  """Returns what the bindings of stages begin with."""
  return tuple(f"{stage}/" for stage in stages)


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


def _instead(name: str, places: Sequence[str], used: Bound) -> str:
  """Returns what to bind instead of `name`.

  Args:
    name: of a macro, or `scope/module.Class.parameter`.
    places: scopes in which the parameter is bound.
    used: all that is.
  """
  if places:
    own = [_joined(place, name) for place in places]
    return f"did you mean {' or '.join(own[:3])}?"
  paths = {
    _joined(scope, ".".join([*selector.split(".")[-2:], parameter]))
    for (scope, selector), values in used
    if selector != MACRO
    for parameter in values
  }
  return _nearest_name(name.rpartition(".")[2], _macros(used), sorted(paths))


def _nearest_name(
  asked: str, macros: Sequence[str], paths: Sequence[str]
) -> str:
  """Returns the name most like `asked`, all macros, and how to do without."""
  likeness = {x: _likeness(asked, x) for x in (*macros, *paths)}
  nearest = max(likeness, key=likeness.__getitem__, default="")
  near = likeness and likeness[nearest] > (0.75 if "." in nearest else 0.6)
  hint = f"did you mean {nearest}? Macros" if near else "macros"
  return (
    f"{hint}: {', '.join(macros) or 'none'}.\n"
    "What has no macro has a path: --set=module.Class.field=..., e.g."
    " --set=adapt.Adapt.targets=...\n"
    '("Settings without a macro" in experiments/README.md lists them)'
  )


def _likeness(asked: str, name: str) -> float:
  """Returns how like a name is to what was asked for, from 0 to 1.

  Of a path the last part counts, LR is short for LEARNING_RATE, and a macro
  goes before the field that it sets.
  """
  field = "." in name
  asked, name = asked.upper(), name.rpartition(".")[2].upper()
  words = name.split("_")
  initials = len(words) > 1 and asked == "".join(word[:1] for word in words)
  contained = len(asked) > 2 and asked in words
  ratio = difflib.SequenceMatcher(None, asked, name).ratio()
  return max(ratio, 0.9 * initials, 0.8 * contained) - 0.01 * field


SCHEDULE_PARTS = "warmup", "decay", "rewarm"
"""Parameters in steps, which a schedule has beside `steps`."""


def shorten_schedules(bound: Any, explicit: Iterable[str]) -> None:
  """Lets defaults of warm-up and decay fit into a short run, and says so.

  Where they fill the run they are lowered to half of it together. What the user
  has bound stays, and is refused by the schedule if it does not fit.

  Args:
    bound: gin's bindings, which change.
    explicit: names that the user has bound.
  """
  explicit = set(explicit)
  for (scope, selector), values in list(bound.items()):
    if "warmup" not in values or "steps" not in values:
      continue
    place = _joined(scope, ".".join(selector.split(".")[-2:]))
    steps, _, _ = _resolved(bound, values, "steps", place)
    parts = {
      part: _resolved(bound, values, part, place)
      for part in SCHEDULE_PARTS
      if part in values
    }
    numbers = [steps, *(number for number, _, _ in parts.values())]
    if not all(type(x) is int and x >= 0 for x in numbers):
      continue  # the schedule says what is wrong
    total = sum(numbers[1:])
    if total < steps or any(explicit & names for _, names, _ in parts.values()):
      continue
    for number, names, write in parts.values():
      if (shorter := number * (steps // 2) // max(total, 1)) != number:
        write(shorter)
        name = max(names, key=lambda x: "." not in x)
        folders.warn(
          f"{name}: {shorter} steps instead of {number}, as the run has"
          f" {steps}; --set={name}=... says how many"
        )


def _resolved(
  bound: Any, values: Any, parameter: str, place: str
) -> tuple[Any, set[str], Any]:
  """Returns a parameter's value, its names, and what writes another value.

  Args:
    bound: gin's bindings.
    values: those of the configurable.
    parameter: its name.
    place: `scope/module.Class`.
  """
  names, key = {f"{place}.{parameter}"}, parameter
  while (macro := getattr(values[key], "config_key", ("", "")))[1] == MACRO:
    if macro not in bound or macro[0] in names:
      break  # gin says that it has no value
    names.add(macro[0])
    values, key = bound[macro], "value"
  return values[key], names, lambda new: values.update({key: new})
