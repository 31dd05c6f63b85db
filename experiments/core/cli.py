"""What every command shares: flags, help, errors for people, a JSON line.

A command is a module with a docstring, absl flags, and a `main(argv)` that
returns its result. `run` parses the flags, prints that result as the last line
on stdout, and turns what a user can mend into one to three lines on stderr.
"""

import json
import math
import os
import pathlib
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags

_SHARED = flags.FlagValues()
flags.DEFINE_bool(
  "traceback",
  False,
  "Show where in the code an error came from.",
  flag_values=_SHARED,
)
# The next two are read by runtime.prepare, before flags are parsed.
flags.DEFINE_bool(
  "typecheck",
  True,
  "Check shapes and types of every call at run time.",
  flag_values=_SHARED,
)
flags.DEFINE_bool(
  "huge_pages",
  True,
  "Let glibc ask for huge pages (Linux; faster on CPU).",
  flag_values=_SHARED,
)

_CLUSTER = flags.FlagValues()
flags.DEFINE_integer(
  "devices",
  None,
  "Compute on so many virtual CPU devices, to try a mesh out.",
  flag_values=_CLUSTER,
)
flags.DEFINE_string(
  "coordinator",
  None,
  "host:port where process 0 listens, for several processes. SLURM, Open MPI, "
  "GKE and TPU pods need none of these flags.",
  flag_values=_CLUSTER,
)
flags.DEFINE_integer(
  "processes", None, "How many processes there are.", flag_values=_CLUSTER
)
flags.DEFINE_integer(
  "process", None, "Which of them this one is, from 0.", flag_values=_CLUSTER
)

MODEL = (
  "A Hugging Face directory, a PEFT adapter's, a run's working directory, a "
  "checkpoint that convert wrote, a .gguf file, org/name on the Hugging Face "
  "Hub, or the name smollm2-135m."
)
"""What `--model` takes."""

Main = Callable[[Sequence[str]], dict[str, Any] | None]
flags.FLAGS.append_flag_values(_SHARED)


def new_flags(cluster: bool = False) -> flags.FlagValues:
  """Returns the flags of one command, so far those that every command has.

  Args:
    cluster: whether it may be one process of several, on many devices.

  A command keeps them in `FLAGS` and defines its own with `flag_values=FLAGS`:
  two commands in one process then do not get in each other's way.
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
  """Prints a line for people, at once."""
  print(text, flush=True)


def warn(text: str) -> None:
  """Prints a warning for people on stderr, which no JSON is read from."""
  print(f"warning: {text}", file=sys.stderr, flush=True)


def required(**values: Any) -> None:
  """Raises UserError for the first flag without a value."""
  for name, value in values.items():
    if value is None or value == "":
      from research.typing import UserError

      raise UserError(f"--{name}: is missing; --help says what it is")


def local(**paths: str | None) -> None:
  """Raises UserError for the first flag that names no local path."""
  for name, path in paths.items():
    if path is not None and "://" in path:
      from research.typing import UserError

      raise UserError(
        f"--{name}={path}: found an object store's, expected a local path;"
        " copy or mount it first"
      )


def run(main: Main) -> NoReturn:
  """Runs a command and ends the process with its status."""
  warnings.showwarning = _show_warning
  try:
    status = call(main, sys.argv)
    sys.stdout.flush()
  except OSError:
    # Whoever read our output has gone, or it is a file on a full disk, which
    # has been said; Python would complain again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
  if status and "jax" in sys.modules:
    from experiments.core import runtime

    runtime.leave(status)
  sys.exit(status)


def _show_warning(message, category, filename, lineno, file=None, line=None):
  """Prints the library's own warnings as a line; once for all processes."""
  if category is not RuntimeWarning:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr, flush=True)
    return
  if "jax" in sys.modules:
    import jax

    if jax.distributed.is_initialized() and jax.process_index():
      return
  print(f"warning: {message}", file=file or sys.stderr, flush=True)


def call(main: Main, argv: Sequence[str]) -> int:
  """Runs a command on `argv`; returns its exit status.

  0: done, 1: an error, 2: a wrong command line, 42: asked to stop, and saved,
  so that the same command goes on (`training.preemption`), 130: interrupted,
  with nothing saved.
  """
  values = _flags(main)
  for name in values:
    values[name].unparse()
  asked = {"--help", "-h", "-help", "--helpshort", "--helpfull"}
  if asked & set(argv[1:]):
    argv, main = argv[:1], _helps(main)
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    return _fail(f"{' '.join(str(error).split())} (--help lists the flags)", 2)
  if rest:
    return _fail(
      f"{rest[0]!r}: found an argument, expected flags such as --name=value", 2
    )
  try:
    result = main(list(argv))
    if result is not None:
      print(json.dumps(plain(result)), flush=True)
  except KeyboardInterrupt:
    return _fail("interrupted", 130)
  except BrokenPipeError:
    raise
  except Exception as error:
    text = explanation(error)
    if text is None or values["traceback"].value:
      traceback.print_exc()
      return 1
    status = getattr(error, "exit_status", None)  # a `Preempted` has one
    return (
      _fail(text, 1) if status is None else _fail(text, status, "preempted")
    )
  return 0


def _helps(main: Main) -> Main:
  text = describe(main)
  return lambda argv: say(text)


def _flags(main: Main) -> flags.FlagValues:
  """Returns the flags of `main`'s module; absl's global ones by default."""
  return getattr(sys.modules[main.__module__], "FLAGS", flags.FLAGS)


def _fail(text: str, status: int, kind: str = "error") -> int:
  print(f"{kind}: {text}", file=sys.stderr, flush=True)
  return status


def explanation(error: BaseException) -> str | None:
  """Returns what to tell the user, or None for an error of ours."""
  from research.typing import UserError

  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.strerror:
    where = error.filename if error.filename is not None else "output"
    return f"{where}: {error.strerror}"
  return None


def plain(x: Any) -> Any:
  """Returns `x` as JSON's own types; numbers that are not finite are null."""
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


def describe(main: Main) -> str:
  """Returns the help of a command: its docstring, then its flags."""
  module = sys.modules[main.__module__]
  # absl files the flags of a program's own module under its path.
  name = sys.argv[0] if main.__module__ == "__main__" else main.__module__
  by_module = _flags(main).flags_by_module_dict()
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
  text = textwrap.fill(
    # absl adds to the help of a flag that may be repeated.
    " ".join(flag.help.split()).replace(".; repeat", "; repeat"),
    78,
    initial_indent=" " * 6,
    subsequent_indent=" " * 6,
  )
  if flag.boolean:
    text += " (on by default)" if value else ""
  return f"  {name}\n{text}"


def read_text(path: str, flag: str) -> str:
  """Returns a text file's content.

  Args:
    path: of a file in UTF-8.
    flag: which named it, for the errors.

  Raises:
    UserError: it is missing, no file, empty, or no UTF-8.
  """
  from research.typing import UserError

  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"--{flag}={path}: {error.strerror}") from error
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"--{flag}={path}: is no UTF-8 at byte {error.start}; convert it first"
    ) from error
  if not text.strip():
    raise UserError(f"--{flag}={path}: is empty, expected some text")
  return text
