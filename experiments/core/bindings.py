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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.interop import packages
from research.io import folders

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
"""Beside the package, in a checkout and in an installation alike."""

_DATA = "records|text_records|sources|rows|arrays|answers"
"""Modules of what reads data from paths."""

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


def check_workdir(workdir: str, fix: str = "") -> None:
  """Raises UserError, which ends with a fix, unless a directory has a run."""
  if not (folders.folder(workdir) / "config.gin").exists():
    raise UserError(
      f"--workdir={workdir}: found no config.gin there, expected the directory "
      f"of a run of experiments.train{fix}"
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
  path: str,
  lines: Sequence[str] = (),
  flag: str = "config",
  unneeded: str = "",
  root: str = "experiment.Experiment",
) -> None:
  """Refuses what a run file's text shows to be wrong, before it is built.

  Building it imports all that it configures. What is refused here would be
  refused then: a file that is missing, a macro that no file has or that has no
  value, a text in place of `@...`, and a model, a file of data or a run that is
  not there.

  Args:
    path: see `find`.
    lines: bindings of the command line.
    unneeded: regular expression of fields whose values need not be there.
    root: the class that is built, `module.Class`.
  """
  text = whole_text(find(path, flag))
  lined = re.findall(r"^([\w./]+)[ \t]*=[ \t]*([^\n#]*)", text, re.MULTILINE)
  bound = {_short(name): value.strip() for name, value in lined}
  macros = {x.rpartition("/")[2] for x in bound if "." not in x}
  macros |= set(re.findall(r"%(?!gin\b)(\w+)", text))
  flags = {_short(name_of(line)): line for line in from_flags(lines)}
  for name, line in flags.items():
    target = name.rpartition("/")[2]
    if "." not in target and target not in macros:
      paths = [x for x in bound if "." in x]
      raise UserError(
        f"{path}: --set={line}: nothing in this run uses it; "
        + _nearest_name(target, sorted(macros), paths)
      )
    _, before = _value_of(bound, name)
    bound[name] = line.partition("=")[2].strip()
    if before.startswith("@") and bound[name][0] in "'\"":
      kind = re.findall(r"[\w.]+", before)[-1]
      fields = [x for x in bound if x.startswith(f"{kind}.")]
      hint = f"; did you mean {fields[0]}?" if fields else ""
      raise UserError(
        f"{path}: --set={line}: found a text, expected a value such as"
        f" {before}{hint}"
      )
  aliased = re.search(r"^(?:from|import)\b.* as ", text, re.MULTILINE)
  if not aliased and not any(f"{root}." in name for name in bound):
    raise UserError(f"{path}: {NOT_BOUND.format(root)}")
  for field, name, value in _values_in_use(bound, unneeded, root):
    place = f"--set={flags[name]}" if name in flags else f"{name} = {value}"
    if re.fullmatch(r"%\w+", value):
      raise UserError(
        f"{path}: {value}: has no value; add a line {value[1:]} = ..."
      )
    if value == "%gin.REQUIRED" and "." not in name:
      last = name.rpartition("/")[2]
      raise UserError(
        f"{path}: {last}: is required: --set={last}=..., or a line {last} = ..."
      )
    _check_value(field, name, value, place)


NOT_BOUND = (
  "binds nothing of {}, which this command builds; is it of another command, or"
  " of an older version (CHANGELOG.md)?"
)


def _short(name: str) -> str:
  """Returns a binding's name without the packages of its module."""
  scope, slash, target = name.rpartition("/")
  return scope + slash + ".".join(target.split(".")[-3:])


def _value_of(
  bound: Mapping[str, str], name: str, scope: str = ""
) -> tuple[str, str]:
  """Returns (binding, value) of a name, or those of the macro that it names.

  Args:
    bound: gin's text of values, by name.
    name: without a scope.
    scope: whose bindings win, the inner ones first.
  """
  parts, last = [x for x in scope.split("/") if x], (name, "")
  for _ in bound:  # there may be a circle
    places = ["/".join([*parts[:n], name]) for n in range(len(parts), -1, -1)]
    place = next((x for x in places if x in bound), None)
    if place is None:
      break
    last = place, bound[place]
    if not re.fullmatch(r"%\w+", last[1]):
      break
    name = last[1][1:]
  return last


def _values_in_use(
  bound: Mapping[str, str], unneeded: str, root: str
) -> Iterator[tuple[str, str, str]]:
  """Yields (`module.Class.field`, binding, value) of what a command builds."""
  fields: dict[str, list[str]] = {}
  for target in (name.rpartition("/")[2] for name in bound):
    if not re.fullmatch(unneeded, target):
      kind, _, field = target.rpartition(".")
      fields.setdefault(kind, []).append(field)
  stages = re.findall(r"\w+", bound.get("staged.Stages.names", "")) or [""]
  # The model of a later stage is the result of the one before by default.
  models = {f"{x}/experiment.Experiment.model": "" for x in stages[1:]}
  bound = models | dict(bound)
  todo = [(root, stage) for stage in stages]
  for kind, scope in todo:  # which grows
    for field in dict.fromkeys(fields.get(kind, ())):
      name, value = _value_of(bound, f"{kind}.{field}", scope)
      yield f"{kind}.{field}", name, value
      values = [value]
      for x in values:  # which grows
        macros = re.findall(r"%(\w+)", x)
        parts = (_value_of(bound, macro, scope)[1] for macro in macros)
        values += [part for part in parts if part not in values]
        for inner, target in re.findall(r"@([\w/]*/)?([\w.]+)", x):
          part = _short(f"_.{target}")[2:], f"{scope}/{inner}".strip("/")
          todo += [part] * (part not in todo)


def _check_value(field: str, name: str, value: str, place: str) -> None:
  """Refuses a path or a model's name that stands for nothing."""
  try:
    literal = ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return
  texts = literal if isinstance(literal, (list, tuple)) else (literal,)
  if not all(isinstance(x, str) for x in texts):
    return
  if field in ("experiment.Pretrained.name", "rewards.PretrainedReward.name"):
    packages.check_name(*texts)
  is_run = re.fullmatch(r"(trained|verifiers)\.\w+\.workdir", field)
  is_data = re.fullmatch(rf"({_DATA})\.\w+\.(paths?|folder)", field)
  for text in texts:
    if (
      is_run and "://" not in text and not os.path.isfile(f"{text}/config.gin")
    ):
      raise UserError(
        f"{place}: found no config.gin there, expected the working directory"
        f" of a run of experiments.train; --set={name}=DIR names it"
      )
    if is_data and not os.path.exists(text) and glob.escape(text) == text:
      raise UserError(
        f"{text}: cannot be read (No such file or directory).\n"
        f"Expected a file, from {place}; check the path."
      )


def whole_text(file: pathlib.Path) -> str:
  """Returns a gin file's text behind those of the files that it includes."""
  text = folders.read_text(file)
  files = [find(x, folder=file.parent) for x in included(text)]
  return "\n".join([*(whole_text(x) for x in files if x != file), text])


def included(text: str) -> list[str]:
  """Returns the paths of the files that a gin file includes."""
  return re.findall(r"^include\s+['\"](.+)['\"]", text, re.MULTILINE)


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
  try:
    if value[0] in "([{'\"":
      list(tokenize.generate_tokens(io.StringIO(value).readline))
  except (tokenize.TokenError, SyntaxError) as error:
    raise UserError(
      f"--set={line}: found a bracket or quote that does not end, expected a"
      " whole value."
    ) from error
  return name + _value(value.strip())


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
    return bool(re.search(rf"%{re.escape(name)}\b", text))

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
    scope, _, target = name.rpartition("/")
    if scope.partition("/")[0] in stages:
      continue
    own = _of_stages(name, stages, theirs or {})
    if "." in target and not scope:
      own += [joined(x, name) for x in set(_scopes(target, used)) - {scope}]
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
    if not reached and scope.partition("/")[0] not in stages:
      instead = _instead(name, sorted(set(places)), used)
      if stages and scope:
        instead += f"; stages: {', '.join(stages)}"
      without_effect.append((line, instead))
  return without_effect


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
  return sorted({scope for (scope, name), _ in used if name == MACRO})


def joined(scope: str, name: str) -> str:
  """Returns the name of a parameter in another scope."""
  return f"{scope}/{name.rpartition('/')[2]}".lstrip("/")


def _instead(name: str, places: Sequence[str], used: Bound) -> str:
  """Returns what to bind instead of `name`."""
  if places:
    own = [joined(place, name) for place in places]
    return f"did you mean {' or '.join(own[:3])}?"
  paths = {
    joined(scope, ".".join([*selector.split(".")[-2:], parameter]))
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
