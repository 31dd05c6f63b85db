"""Signs of life of long work: what goes on, how far it is, how long it takes.

  with progress.phase("compiling the step"):
    ...
  for matrix in progress.track(matrices, "diagnosing matrices"):
    ...

The library says so wherever work may take long. Nothing is printed unless the
caller listens, as every command does:

  with progress.report_to(print):
    ...

Work that ends soon prints nothing, then come lines further and further apart,
such as "diagnosing matrices: 34 of 210, 21 s, about 2 min to go".
"""

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

FIRST = 10.0
"""Seconds of silence before the first line."""

MOST = 60.0
"""Seconds between two lines, in the end."""

_GROWTH = 1.5
_POLL = 0.5

_LISTENER: contextvars.ContextVar["Listener | None"] = contextvars.ContextVar(
  "listener", default=None
)


class Phase:
  """Work that goes on; `phase` makes it.

  Attributes:
    what: the work, in a few words; None says nothing meanwhile.
    done: parts that are done.
    total: all parts; None if they are not counted.
  """

  def __init__(self, what: str | None, total: int | None, start: float):
    """Begins at `start`, in seconds of the listener's clock."""
    self.what, self.total, self.done = what, total, 0
    self._start = start

  def line(self, now: float) -> str | None:
    """Returns what is printed at time `now`; None for nothing."""
    if self.what is None:
      return None
    spent = now - self._start
    if not self.total:
      return f"{self.what}: {duration(spent)}"
    text = f"{self.what}: {self.done} of {self.total}, {duration(spent)}"
    if not 0 < self.done <= self.total:
      return text
    left = spent * (self.total - self.done) / self.done
    return f"{text}, about {duration(left)} to go"


def duration(seconds: float | int) -> str:
  """Returns seconds, minutes or hours, whole."""
  if seconds < 100:
    return f"{round(seconds)} s"
  if seconds < 100 * 60:
    return f"{round(seconds / 60)} min"
  return f"{round(seconds / 3600)} h"


class Listener:
  """Prints what goes on, once it has for long."""

  def __init__(
    self,
    write: Callable[[str], Any],
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prints by `write`; `clock` returns seconds."""
    self.clock = clock
    self._write, self._phases = write, []
    self._last, self._gap, self._shown = clock(), FIRST, None

  def push(self, what: str | None, total: int | None) -> Phase:
    """Returns a phase that begins now, within those that go on."""
    phase = Phase(what, total, self.clock())
    self._phases = [*self._phases, phase]
    return phase

  def pop(self, phase: Phase) -> None:
    """Ends a phase."""
    self._phases = [other for other in self._phases if other is not phase]

  def tick(self) -> None:
    """Prints a line if it is time."""
    now, phases = self.clock(), self._phases
    phase = phases[-1] if phases else None
    if phase is not self._shown:
      self._shown, self._gap = phase, FIRST
    text = None if phase is None else phase.line(now)
    if text is None:  # silent on purpose, for as long as it takes
      self._last = now
    elif now - self._last >= self._gap:
      self._last, self._gap = now, min(self._gap * _GROWTH, MOST)
      self._write(text)


@contextlib.contextmanager
def report_to(
  write: Callable[[str], Any], what: str | None = None
) -> Iterator[None]:
  """Prints what goes on inside, from a thread.

  Args:
    write: prints a line.
    what: is said while nothing else is known.
  """
  listener, ended = Listener(write), threading.Event()

  def watch():
    while not ended.wait(_POLL):
      listener.tick()

  thread = threading.Thread(target=watch, daemon=True)
  token = _LISTENER.set(listener)
  thread.start()
  try:
    with phase(what):
      yield
  finally:
    _LISTENER.reset(token)
    ended.set()
    thread.join()


@contextlib.contextmanager
def phase(what: str | None, total: int | None = None) -> Iterator[Phase]:
  """Says that some work goes on inside.

  Args:
    what: the work, in a few words; None where it speaks for itself.
    total: the number of its parts, which `Phase.done` counts.
  """
  listener = _LISTENER.get()
  if listener is None:
    yield Phase(what, total, 0.0)
    return
  started = listener.push(what, total)
  try:
    yield started
  finally:
    listener.pop(started)


def track(
  parts: Iterable[Any], what: str, total: int | None = None
) -> Iterator[Any]:
  """Yields the parts of some work, and counts those that are done.

  Args:
    parts: any; those of a sequence are counted.
    what: the work, in a few words.
    total: the number of parts; by default that of the sequence.
  """
  if total is None and hasattr(parts, "__len__"):
    total = len(parts)
  with phase(what, total) as now:
    for part in parts:
      yield part
      now.done += 1
