"""Verifiers that may hang, die or raise, behind a process and a time limit.

`Isolated(task)` verifies in a process of its own: what hangs is a verdict
"timeout", what raises is a verdict "error", and the next text gets a new
process. `Guarded(verifier)` only catches what raises, and costs nothing.
Requests and answers are JSON; nothing is pickled.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from research.errors import UserError
from research.reasoning.problem import (
  Problem,
  StepVerdict,
  Verdict,
  Verifier,
)

START_SECONDS = 120
"""For a process to import what it serves, on a loaded machine."""

MEMORY = 4 << 30
"""Address space of a process, in bytes."""


# OpenBLAS reserves address space for every core, of which there may be many.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class TimedOut(Exception):
  """A call took longer than it may."""


class Failed(Exception):
  """A call raised, or its process died."""


class Worker:
  """Calls the functions of a module in another process.

  Threads may share one: it does one call at a time.
  """

  def __init__(self, module: str, seconds: float | int, memory: int = MEMORY):
    """Starts nothing; the first call does.

    Args:
      module: module whose public functions are called, with JSON in and out.
      seconds: wall time of a call.
      memory: address space of the process, in bytes.
    """
    if not seconds > 0:
      raise UserError(f"Worker.seconds: found {seconds}, expected more than 0.")
    self.module, self.seconds, self.memory = module, seconds, memory
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._read = b""
    self._stop: Callable[[], Any] = _nothing

  def call(self, name: str, *args: Any) -> Any:
    """Returns what a function of the module returns.

    Raises:
      TimedOut: it takes longer than `seconds`; the process is ended.
      Failed: it raises, or its process dies.
      UserError: the module cannot be imported, or a package is missing.
    """
    request = json.dumps({"call": name, "args": args}) + "\n"
    with self._lock:
      process = self._process or self._start()
      try:
        process.stdin.write(request.encode())
        process.stdin.flush()
        answer = self._line(process, self.seconds)
      except BaseException as error:
        self._end()  # also when the user interrupts: the answer is not read
        if isinstance(error, OSError):
          raise Failed("the process died") from error
        raise
    if "error" in answer:
      kind, _, text = answer["error"].partition(": ")
      raise UserError(text) if kind == "UserError" else Failed(answer["error"])
    return answer["value"]

  def close(self) -> None:
    """Ends the process; another call starts a new one."""
    with self._lock:
      self._end()

  def _start(self) -> subprocess.Popen:
    path = os.pathsep.join(x for x in sys.path if x)
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "research.reasoning.worker"),
        *(self.module, str(self.memory)),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=os.environ | {"PYTHONPATH": path, **_ONE_THREAD},
    )
    self._process, self._read = process, b""
    self._stop = weakref.finalize(self, _kill, process)
    try:
      ready = self._line(process, START_SECONDS)
    except (TimedOut, OSError) as error:
      self._end()
      raise Failed(f"{self.module} cannot be served: {error}") from error
    if "error" in ready:
      self._end()
      raise UserError(
        f"{self.module} cannot be imported in a process of its own.\n"
        f"{ready['error']}"
      )
    return process

  def _end(self) -> None:
    self._stop()
    self._process, self._stop = None, _nothing

  def _line(
    self, process: subprocess.Popen, seconds: float | int
  ) -> dict[str, Any]:
    """Returns the next answer.

    Raises:
      TimedOut: there is none in time.
      OSError: the process has ended.
    """
    deadline = time.monotonic() + seconds
    while b"\n" not in self._read:
      left = deadline - time.monotonic()
      if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
        raise TimedOut(f"more than {seconds:g} s")
      part = os.read(process.stdout.fileno(), 1 << 16)
      if not part:
        raise OSError("the process ended")
      self._read += part
    line, _, self._read = self._read.partition(b"\n")
    return json.loads(line)


def _nothing() -> None:
  pass


def _kill(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  for pipe in (process.stdin, process.stdout):
    with contextlib.suppress(OSError):  # a request that was never read
      pipe.close()


@functools.lru_cache(maxsize=16)
def shared(module: str, seconds: float | int) -> Worker:
  """Returns the one process that serves a module with a time limit."""
  return Worker(module, seconds)


@dataclasses.dataclass(frozen=True)
class Guarded:
  """A verifier whose exceptions and delays are verdicts, with a warning.

  Attributes:
    verifier: whatever has `verify`, and `verify_step` or not.
    seconds: wall time of a text or a step; None for any number. What takes
      longer runs on beside: `Isolated` ends it.
    failures: how many verdicts there were in place of the verifier's, by kind.
  """

  verifier: Verifier
  seconds: float | int | None = None
  failures: collections.Counter = dataclasses.field(
    default_factory=collections.Counter, init=False, repr=False, compare=False
  )

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns its verdict, or a wrong one with the reason "error: ..."."""
    verdict = self._call(lambda: self.verifier.verify(problem, text), Verdict)
    return _failed(verdict) if isinstance(verdict, str) else verdict

  def verify_step(
    self, problem: Problem, steps: Sequence[str], step: str
  ) -> StepVerdict:
    verdict = self._call(
      lambda: self.verifier.verify_step(problem, steps, step), StepVerdict
    )
    return (
      StepVerdict("unknown", verdict) if isinstance(verdict, str) else verdict
    )

  def _call(self, call: Callable[[], Any], kind: type) -> Any:
    """Returns what a call returns, or why it returns nothing of its kind."""
    try:
      verdict = within(self.seconds, call)
    except TimedOut as error:
      return self._counted("timeout", f"timeout: {error}")
    except Exception as error:
      name = type(error).__name__
      return self._counted(name, f"error: {name}: {error}")
    if not isinstance(verdict, kind):
      text = f"error: found {verdict!r:.60} instead of a {kind.__name__}"
      return self._counted(type(verdict).__name__, text)
    return verdict

  def _counted(self, kind: str, reason: str) -> str:
    self.failures[kind] += 1
    if self.failures[kind] == 1:
      warnings.warn(
        f"{type(self.verifier).__name__}: not judged, and so not correct:"
        f" {reason}",
        stacklevel=2,
      )
    return reason


def guard(
  judge: Callable[..., Any], verifier: Any, seconds: float | int | None
) -> Any:
  """Returns a verifier behind `judge`, such as `Guarded` or `Isolated`.

  Args:
    seconds: wall time for a verdict; None for the guard's default.
  """
  return judge(verifier, **({} if seconds is None else {"seconds": seconds}))


@dataclasses.dataclass(frozen=True)
class Isolated:
  """A verifier in a process of its own, with a time limit.

  Attributes:
    verifier: a frozen dataclass, such as a task: the process makes its own.
    seconds: wall time of a text or a step.
  """

  verifier: Any
  seconds: float | int = 10.0

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns its verdict, or a wrong one: "timeout" or "error: ..."."""
    try:
      return Verdict.from_json(self._call("hosted_verify", problem, text))
    except TimedOut as error:
      return _failed(f"timeout: {error}")
    except Failed as error:
      return _failed(f"error: {error}")

  def verify_step(
    self, problem: Problem, steps: Sequence[str], step: str
  ) -> StepVerdict:
    """Returns its verdict, "unknown" if there is none in time."""
    try:
      verdict = self._call("hosted_verify_step", problem, list(steps), step)
      return StepVerdict.from_json(verdict)
    except TimedOut as error:
      return StepVerdict("unknown", f"timeout: {error}")
    except Failed as error:
      return StepVerdict("unknown", f"error: {error}")

  def _call(self, name: str, problem: Problem, *args: Any) -> Any:
    worker = shared(__name__, self.seconds)
    return worker.call(name, describe(self.verifier), problem.to_json(), *args)


def within(seconds: float | int | None, call: Callable[[], Any]) -> Any:
  """Returns what a call returns, or raises what it raises, within some time.

  Args:
    seconds: wall time; None for any number.
    call: in this process; what takes longer runs on in its thread.

  Raises:
    TimedOut: it does neither in time.
  """
  if seconds is None:
    return call()
  outcomes: queue.Queue = queue.Queue()

  def run():
    try:
      outcomes.put((call(), None))
    except BaseException as error:
      outcomes.put((None, error))

  threading.Thread(target=run, daemon=True).start()
  try:
    value, error = outcomes.get(timeout=seconds)
  except queue.Empty:
    raise TimedOut(f"more than {seconds} s") from None
  if error is not None:
    raise error
  return value


def _failed(reason: str) -> Verdict:
  return Verdict(False, reason=reason)


def describe(value: Any) -> Any:
  """Returns JSON from which `build` makes a frozen dataclass again.

  Raises:
    UserError: a field is neither JSON, nor a function, nor such a dataclass.
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = [x.name for x in dataclasses.fields(value) if x.init]
    return {
      "type": f"{type(value).__module__}:{type(value).__qualname__}",
      "fields": {name: describe(getattr(value, name)) for name in fields},
    }
  if isinstance(value, tuple | list):
    return {"tuple": [describe(x) for x in value]}
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, dict) and all(isinstance(x, str) for x in value):
    return {"dict": {name: describe(x) for name, x in value.items()}}
  module, name = (
    getattr(value, x, None) for x in ("__module__", "__qualname__")
  )
  if callable(value) and module and name and "<" not in name:
    return {"function": f"{module}:{name}"}
  raise UserError(
    f"Isolated: found {value!r:.60} in a verifier, expected JSON's types,"
    " functions of a module, and frozen dataclasses of such."
  )


def build(description: Any) -> Any:
  """Returns the value that `describe` described; lists become tuples."""
  if not isinstance(description, dict):
    return description
  if "tuple" in description:
    return tuple(build(x) for x in description["tuple"])
  if "dict" in description:
    return {name: build(x) for name, x in description["dict"].items()}
  module, _, path = (
    description.get("type") or description["function"]
  ).partition(":")
  value = importlib.import_module(module)
  for name in path.split("."):
    value = getattr(value, name)
  if "function" in description:
    return value
  return value(**{k: build(x) for k, x in description["fields"].items()})


@functools.lru_cache(maxsize=16)
def _hosted(description: str) -> Any:
  return build(json.loads(description))


def hosted_verify(description: Any, problem: Any, text: str | None) -> Any:
  """What `Isolated.verify` has its process do."""
  verifier = _hosted(json.dumps(description))
  return verifier.verify(Problem.from_json(problem), text).to_json()


def hosted_verify_step(
  description: Any, problem: Any, steps: list[str], step: str
) -> Any:
  """What `Isolated.verify_step` has its process do."""
  verifier = _hosted(json.dumps(description))
  verdict = verifier.verify_step(Problem.from_json(problem), steps, step)
  return verdict.to_json()
