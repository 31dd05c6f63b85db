"""From gin files to an `Experiment`, and back to text that rebuilds it.

The only module that imports gin. Files use dynamic registration (their first
line is `from __gin__ import dynamic_registration`), so the library carries no
decorator: a file imports the modules it configures and binds their arguments
by name. Types are checked by the run-time hook, since a gin value is an
argument like any other.
"""

import contextlib
import io
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import gin
from gin import config as gin_config

from experiments.core import bindings as binding_lines
from experiments.core.bindings import (
  CONFIGS,
  MACRO,
  Record,
  check_used,
  find,
  places,
)
from experiments.core.experiment import Experiment
from experiments.stages.staged import Staged, Stages, open_results
from research.io import folders
from research.typing import UserError

_FROM_STAGE = """
from __gin__ import dynamic_registration
from experiments.core import experiment
from experiments.stages import staged
experiment.Experiment.model = @staged.StageResult()
staged.StageResult.stage = '{before}'
"""


class Read(NamedTuple):
  """An experiment, its stages or another root, and text that rebuilds it."""

  experiment: Any
  text: str


def read(
  path: str,
  bindings: Sequence[str] = (),
  root: type = Experiment,
  flag: str = "config",
) -> Read:
  """Returns the experiment that a gin file describes, or its stages.

  Args:
    path: a gin file, see `find`. It may include files relative to the working
      directory, to itself, or to `configs/`.
    bindings: further lines, which win: `"STEPS = 20"`, `"lora.LoRA.rank=4"`.
    root: the class to build, without arguments.

  Raises:
    UserError: the file is missing, names a module or parameter that does not
      exist, gives a value of the wrong type, or a binding changes nothing.
  """
  file = find(path, flag)
  text = folders.read_text(file)
  return parse(text, bindings, path, root, file.parent)


def read_workdir(workdir: str, bindings: Sequence[str] = ()) -> Read:
  """Returns the experiment that a run's working directory is of.

  Raises:
    UserError: there is no run, or what `read` raises.
  """
  binding_lines.check_workdir(workdir)
  file = folders.folder(workdir) / "config.gin"
  read = parse(file.read_text("utf-8"), bindings, str(file))
  return read._replace(experiment=_opened(read.experiment, file.parent))


def _opened(experiment: Any, workdir: Any) -> Any:
  """Returns an experiment that finds the results of earlier stages."""
  if isinstance(experiment, Staged):
    return experiment.in_workdir(workdir)
  if not isinstance(experiment, Experiment):
    return experiment

  def find(stage):
    place = workdir.parent / stage
    return read_workdir(str(place)).experiment, place

  return open_results(experiment, find)


def parse(
  text: str,
  bindings: Sequence[str] = (),
  name: str = "config",
  root: type = Experiment,
  folder: pathlib.Path | None = None,
) -> Read:
  """Returns the experiment that gin `text` describes.

  Args:
    bindings, root: see `read`.
    folder: of the file, where those that it includes may be.
  """
  # Of a name that is bound twice the last value counts; flags must not be.
  lines = [binding_lines.from_flag(line) for line in bindings]
  explicit = _own_names(text, folder)
  own = [x for x in binding_lines.unreferenced(text) if x in explicit]
  explicit += map(binding_lines.name_of, lines)
  with _parsed(text, lines, name, folder):
    names = _stage_names() if root is Experiment else ()
    if not names:
      read, used = _built(root, explicit)
      used = _with_aliases(used)
      check_used(lines, used)
      _check_file(own, lines, used)
      return read
    whole = gin.config_str()
    first = _effective(gin_config._OPERATIVE_CONFIG)
    reads, shared = {}, [_with_aliases(first)]
  theirs: dict[tuple[str, str], Any] = {}
  for stage, before in zip(names, (None, *names), strict=False):
    with _parsed(text, lines, name, folder), _named(stage):
      bound = _enter(stage, names, before)
      scoped = [*explicit, *_within(stage, explicit)]
      reads[stage], used = _built(root, scoped)
      shared.append(_with_aliases(_without(used, bound)))
      used, bound = _with_aliases(used), _with_aliases(bound)
      check_used(_within(stage, lines), used)
      _check_file(_within(stage, own), lines, used)
      theirs |= {
        (f"{stage}/{scope}".rstrip("/"), selector): values
        for (scope, selector), values in bound.items()
      }
  with _readable(name):
    check_used(lines, *shared, stages=names, theirs=theirs)
    _check_file(own, lines, *shared, stages=names)
  staged = Staged(
    stages={stage: read.experiment for stage, read in reads.items()},
    texts={stage: read.text for stage, read in reads.items()},
  )
  return Read(staged, whole)


@contextlib.contextmanager
def _parsed(
  text: str, lines: Sequence[str], name: str, folder: pathlib.Path | None
) -> Iterator[None]:
  """Binds what a gin file's text and further lines say; see `parse`."""
  with _empty(folder), _readable(name):
    file = io.StringIO(text)
    file.name = name  # so that gin's errors say where
    gin.parse_config(file)
    gin.parse_config("\n".join([*_imports(text, folder), *lines]))
    yield


def _built(root: type, explicit: Sequence[str]) -> tuple[Read, Record]:
  """Returns what is bound, built, and which bindings that used."""
  shorten_schedules(gin_config._CONFIG, explicit)
  gin.finalize()
  experiment = gin.get_configurable(root)()
  used = _effective(gin_config._OPERATIVE_CONFIG)
  _drop_defaults()
  return Read(experiment, gin.operative_config_str()), used


SCHEDULE_PARTS = "warmup", "decay", "rewarm"
"""Parameters in steps, which a schedule has beside `steps`."""


def shorten_schedules(bound: Any, explicit: Iterable[str]) -> None:
  """Lets defaults of warm-up and decay fit into a short run, and says so.

  Where they fill the run they are lowered to half of it together. What the user
  has bound stays, and is refused by the schedule if it does not fit.
  """
  explicit = set(explicit)
  for (scope, selector), values in list(bound.items()):
    if "warmup" not in values or "steps" not in values:
      continue
    place = binding_lines.joined(scope, ".".join(selector.split(".")[-2:]))
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
  """Returns a parameter's value, its names, and what writes another value."""
  names, key = {f"{place}.{parameter}"}, parameter
  while (macro := getattr(values[key], "config_key", ("", "")))[1] == MACRO:
    if macro not in bound or macro[0] in names:
      break  # gin says that it has no value
    names.add(macro[0])
    values, key = bound[macro], "value"
  return values[key], names, lambda new: values.update({key: new})


def _stage_names() -> tuple[str, ...]:
  """Returns the names of the stages that are bound, if any are."""
  bound = gin_config._CONFIG
  if not any(selector.endswith(".staged.Stages") for _, selector in bound):
    return ()
  return gin.get_configurable(Stages)().names


def _enter(stage: str, names: Sequence[str], before: str | None) -> Record:
  """Leaves the bindings of a stage: those of its scope, over those of none.

  Args:
    before: the stage whose result its model is, unless it binds another; None
      for the first one.

  Returns:
    The bindings of its scope.
  """
  bound, own = gin_config._CONFIG, {}
  for scope, selector in list(bound):
    first, _, inner = scope.partition("/")
    if selector.endswith(".staged.Stages"):
      del bound[scope, selector]
    elif first in names and (inner or selector != MACRO):
      values = bound.pop((scope, selector))
      if first == stage:
        own[inner, selector] = values
  if before is not None:
    gin.parse_config(_FROM_STAGE.format(before=before))
  for key, values in own.items():
    bound.setdefault(key, {}).update(values)
  return own


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
  """Names the stage in errors of its configuration."""
  try:
    yield
  except UserError as error:
    raise UserError(f"stage {stage!r}: {error}") from error


def _without(used: Record, own: Record) -> Record:
  """Returns a record of what was used, without what a stage has bound."""
  left = {
    key: {name: x for name, x in values.items() if name not in own.get(key, {})}
    for key, values in used.items()
  }
  return {key: values for key, values in left.items() if values}


def _effective(used: Record) -> Record:
  """Returns the bindings that gave the values of a record.

  A value that is used in the scope `a/b` is that of the innermost scope, among
  `a/b`, `a` and none, which has a binding of it.
  """
  bound = gin_config._CONFIG
  found: dict[tuple[str, str], dict[str, Any]] = {}
  for (scope, selector), values in used.items():
    for name, value in values.items():
      for place in reversed(_scopes(scope)):
        if name in bound.get((place, selector), {}):
          found.setdefault((place, selector), {})[name] = value
          break
  return found


def _with_aliases(used: Record) -> Record:
  """Returns a record that also has the names of the imports of this file.

  Gin knows a class by the import of the first file of the process that has one,
  and another file may call its module something else.
  """
  named = dict(used)
  for (scope, selector), values in used.items():
    made = gin_config._REGISTRY[selector].wrapped
    for line in gin_config._IMPORTS:
      if line.module == made.__module__:
        alias = f"{line.partial_path()}.{made.__qualname__}"
        named.setdefault((scope, alias), values)
  return named


def _scopes(scope: str) -> list[str]:
  """Returns the scopes whose bindings hold in a scope, outermost first."""
  parts = scope.split("/") if scope else []
  return ["/".join(parts[:i]) for i in range(len(parts) + 1)]


def _drop_defaults() -> None:
  """Leaves only what was bound in gin's record of what was used.

  Gin finds defaults in signatures, which the run-time type checks hide from
  it: the text would depend on `--typecheck`. A workdir's versions say which
  code its defaults are those of.
  """
  bound = gin_config._CONFIG
  for (scope, selector), used in gin_config._OPERATIVE_CONFIG.items():
    places = [bound.get((place, selector), {}) for place in _scopes(scope)]
    kept = set().union(*places)
    for name in used.keys() - kept:
      del used[name]


def _own_names(text: str, folder: pathlib.Path | None) -> list[str]:
  """Returns what a user's own file binds, and those of theirs in it."""
  if folder is None or folder.is_relative_to(CONFIGS):
    return []
  names = binding_lines.names_in(text)
  for path in binding_lines.included(text):
    file = find(path, folder=folder)
    if not file.is_relative_to(CONFIGS):
      names += _own_names(file.read_text("utf-8"), folder)
  return names


def _within(stage: str, lines: Sequence[str]) -> list[str]:
  """Returns the bindings of a stage's scope, as they are in it."""
  prefix = f"{stage}/"
  return [x.removeprefix(prefix) for x in lines if x.startswith(prefix)]


def _check_file(
  own: Sequence[str],
  lines: Sequence[str],
  *used: Record,
  stages: Sequence[str] = (),
) -> None:
  """Refuses what a user's own file binds and nothing uses.

  Beside bindings of the command line, which may have taken the place of what
  used it, it is warned of.

  Args:
    own: names that the file binds.
    used, stages: see `check_used`.
  """
  for name, instead in binding_lines.unused(own, *used, stages=stages):
    text = f"{name}: nothing in this run uses it; {instead}"
    if not lines:
      raise UserError(text)
    folders.warn(text.splitlines()[0])


def _imports(text: str, folder: pathlib.Path | None = None) -> list[str]:
  """Returns the import lines of `text` and of all it includes.

  Each gin file has imports of its own; a binding from the command line may
  name what any of them does.
  """
  found = [gin_dynamic := "from __gin__ import dynamic_registration"]
  for line in text.splitlines():
    line = line.split("#")[0].strip()
    included = re.fullmatch(r"include\s+['\"](.+)['\"]", line)
    if included:
      file = find(included.group(1), folder=folder)
      found += _imports(file.read_text("utf-8"), folder)
    elif re.match(r"(import|from)\s", line) and line != gin_dynamic:
      found.append(line)
  return list(dict.fromkeys(found))


@contextlib.contextmanager
def _empty(folder: pathlib.Path | None = None) -> Iterator[None]:
  """Leaves gin's global state as empty as it was found."""
  gin.clear_config()
  prefixes = list(gin_config._LOCATION_PREFIXES)
  readers = list(gin_config._FILE_READERS)
  for place in places(folder):
    gin.add_config_file_search_path(str(place))
  # Gin also looks into Python packages, and takes any folder (`runs/`,
  # `models/`) for one: it fails there instead of looking under configs/.
  del gin_config._FILE_READERS[1:]
  # Gin logs an error for each place where an included file is not.
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)
    gin_config._LOCATION_PREFIXES[:] = prefixes
    gin_config._FILE_READERS[:] = readers
    gin.clear_config()


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
  """Turns gin's and the type checker's errors into the user's."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{name}: {_without_gin(str(error))}") from error
  except RecursionError as error:
    raise UserError(f"{name}: a file that it includes includes it") from error
  except Exception as error:
    raise UserError(f"{name}: {_shorten(error)}") from error


def _shorten(error: Exception) -> str:
  """Returns the first cause of gin's or jaxtyping's error, in two lines."""
  text = str(error)
  field = re.search(r"typechecking parameter '(\w+)'", text)
  if field:
    owner = re.search(r"parameters of ([\w.]+?)(\.__init__)?\.\n", text)
    value = re.search(r"Actual value: (.*)", text)
    expected = re.search(r"Expected type: (.*?)\.?\n", text)
    parts: list[Any] = [
      m.group(1) if m else "?" for m in (owner, value, expected)
    ]
    parts[2] = re.sub(r"<class '([\w.]+)'>", r"\1", parts[2])
    parts[2] = re.sub(r"[\w.]*Annotated\[([^,]+), [^]]+\]", r"\1", parts[2])
    parts[2] = re.sub(r"[\w.]*Optional\[([^]]+)\]", r"\1 | None", parts[2])
    return f"{parts[0]}.{field.group(1)}: found {parts[1]}, expected {parts[2]}"
  absent = re.match(r"Could not find <class '[\w.]*?(\w+\.\w+)'> in the", text)
  if absent:
    return binding_lines.NOT_BOUND.format(absent.group(1))
  word = re.search(r"Failed to parse token '(.*)' \((.*)\)", text)
  if word and "malformed node" in text:
    return (
      f"{word.group(2)}: found {word.group(1)}, expected a value: a number, "
      "'text' in quotes,\nTrue, None, (a, list), %MACRO or @module.Class()"
    )
  macro = re.match(r"No bindings specified for '(.+)/gin\.macro'", text)
  if macro:
    return f"%{macro.group(1)}: has no value; add a line {macro.group(1)} = ..."
  missing = re.match(r"(\w+)/macro\.value set to `%gin\.REQUIRED`", text)
  if missing:
    name = missing.group(1)
    return f"{name}: is required: --set={name}=..., or a line {name} = ..."
  kept = [line.strip() for line in _without_gin(text).splitlines()]
  return "\n".join(kept[:3]) or type(error).__name__


def _without_gin(text: str) -> str:
  return "\n".join(
    line
    for line in text.splitlines()
    if line.strip() and not line.lstrip().startswith("In call to")
  )
