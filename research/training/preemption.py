"""Preemption: saves and stops a run on SIGTERM or Ctrl-C.

Schedulers send SIGTERM some seconds before they kill a process. The run then
saves a checkpoint at its next stop point and exits; the same command resumes
it.

* A single process handles both signals itself (`handling_signals`). While it
  has nothing to save (loading, compiling, writing final files), it exits
  immediately.
* With several processes, once they are connected, JAX's coordination service
  broadcasts a SIGTERM that any process receives, and all agree on a stop point.
  So all processes must reach the same stop points in the same order. Ctrl-C is
  turned into a SIGTERM.

A second Ctrl-C ends a process immediately, without saving.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from research.typing import UserError

INTERRUPTED_EXIT = 130
"""Exit status after a second Ctrl-C: 128 plus the number of SIGINT."""

SIGINT_DEBOUNCE = 0.5
"""Seconds within which a second SIGINT counts as the same Ctrl-C, which a
parent process may forward."""

GRACE_SECONDS = 2.0
"""Seconds after which a thread ends a process whose main thread is stuck in
native code and has nothing to save."""

GRACE_VARIABLE = "HEPTAD_GRACE_SECONDS"
"""Environment variable by which a launcher says how many seconds pass between
SIGTERM and SIGKILL: Slurm's KillWait, Kubernetes' termination grace period."""

ASSUMED_RATE = 100e6
"""Bytes a second of a save that was not measured yet: a gigabit network's."""

NOTHING_SAVED = (
  "asked to stop; nothing had to be saved.\nThe same command resumes."
)
"""Message of a `Preempted` run that had no step to save."""


class Preempted(UserError):
  """The run was asked to stop, and has been saved."""

  exit_status = 42
  """Exit status of a command, which tells a launcher to restart it."""


class Interrupted(BaseException):
  """Raised by the signal handler if there is nothing to save.

  A BaseException, like KeyboardInterrupt, so that no `except Exception` takes
  it for an error of the interrupted code.
  """


class StopRequest:
  """A signal handler that records stop requests.

  Attributes:
    requested: whether a signal was received.
    unsaved: whether exiting now would lose a step.
    alone: whether this is the only process, as far as is known.
  """

  def __init__(self):
    self.requested = False
    self.unsaved = False
    self.alone = not jax.distributed.is_initialized() or _is_alone()
    self._raised = False

  def connected(self) -> None:
    """Says that JAX has connected this process to all others of its run.

    If there are others, JAX's own handler of SIGTERM, which tells them, stays.
    They may be ahead of this process, which until it knows them must not leave
    them waiting.

    Raises:
      Interrupted: there are none, and a signal arrived meanwhile.
    """
    if jax.distributed.is_initialized():
      self.alone = False
    self.alone = _is_alone()
    if self.alone:
      signal.signal(signal.SIGTERM, self)  # JAX has put its own there
      if self.requested:
        raise Interrupted

  def __call__(self, number: int, frame: FrameType | None) -> None:
    """Handles a signal, in the main thread, as soon as it runs Python code."""
    first, self.requested = not self.requested, True
    if not self.alone:
      if number == signal.SIGINT and first:
        os.kill(os.getpid(), signal.SIGTERM)
    elif not self.unsaved and not self._raised:
      self._raised = True
      raise Interrupted

  def watch(self, pipe: int) -> None:
    """Handles signals in a thread, in case the main thread is busy.

    See `handling_signals`.

    Args:
      pipe: file descriptor that receives each signal's number, and a final 0.
    """
    pressed = None
    while (number := os.read(pipe, 1)[0]) != 0:
      now = time.monotonic()
      if pressed is None:
        if number == signal.SIGINT:
          pressed = now
          _say("stopping; a run saves first. Ctrl-C again ends it at once.")
        threading.Thread(target=self._end_if_stuck, daemon=True).start()
      elif number == signal.SIGINT and now - pressed > SIGINT_DEBOUNCE:
        _say("interrupted")
        os._exit(INTERRUPTED_EXIT)

  def _end_if_stuck(self) -> None:
    """Ends a process with nothing to save whose main thread runs no Python."""
    time.sleep(GRACE_SECONDS)
    if self.alone and not (self.unsaved or self._raised or self.requested):
      _say(f"preempted: {NOTHING_SAVED}")
      os._exit(Preempted.exit_status)


def _is_alone() -> bool:
  return jax.process_count() == 1


def _say(text: str) -> None:
  # Unbuffered: the main thread may be inside a write to the same buffer.
  with contextlib.suppress(OSError):
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


@contextlib.contextmanager
def handling_signals() -> Iterator[StopRequest | None]:
  """Context in which SIGTERM and Ctrl-C request a save and stop.

  Python's signal handlers run between bytecodes of the main thread, which may
  be compiling, or waiting for other processes, for minutes; so a second thread
  receives each signal, too. Outside of the main thread this context does
  nothing, and yields None.

  Raises:
    Preempted: a signal arrived when there was nothing to save.
  """
  if threading.current_thread() is not threading.main_thread():
    yield None
    return
  request = StopRequest()
  out, into = os.pipe()
  os.set_blocking(into, False)
  watching = threading.Thread(target=request.watch, args=(out,), daemon=True)
  watching.start()
  woken = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
  # With several processes, JAX's own SIGTERM handler stays installed.
  numbers = [signal.SIGINT, *([signal.SIGTERM] if request.alone else [])]
  before = {n: signal.signal(n, request) for n in numbers}
  try:
    yield request
  except Interrupted:
    raise Preempted(NOTHING_SAVED) from None
  finally:
    for n, handler in before.items():
      if request.alone or n == signal.SIGINT:
        signal.signal(n, handler or signal.SIG_DFL)
    signal.set_wakeup_fd(woken)
    os.write(into, b"\0")
    watching.join()
    os.close(out)
    os.close(into)


class SaveTimes:
  """Announces saves that take longer than the launcher gives a run.

  `GRACE_VARIABLE` says how long that is; without it nothing is announced.
  """

  def __init__(self, nbytes: int):
    """Expects `ASSUMED_RATE` until a save was measured.

    Raises:
      UserError: the variable holds no number.
    """
    text = os.environ.get(GRACE_VARIABLE, "")
    try:
      self._grace = float(text or "inf")
    except ValueError as error:
      raise UserError(
        f"{GRACE_VARIABLE}={text}: expected seconds between SIGTERM and SIGKILL"
      ) from error
    self._expected = nbytes / ASSUMED_RATE
    self._measured = self._announced = False

  def too_long(self, requested: bool) -> str | None:
    """Returns what to say before a save; None if it will be in time.

    Args:
      requested: whether a stop was requested: always said then, else once.
    """
    if self._expected <= self._grace or (self._announced and not requested):
      return None
    self._announced = True
    known = "as long as the last one" if self._measured else "by its size"
    return (
      f"saving takes about {self._expected:.0f} s, {known}; a launcher kills a"
      f" run {self._grace:.0f} s after SIGTERM ({GRACE_VARIABLE}; Slurm's"
      " KillWait).\nIf it does, the run goes on from the save before."
    )

  def measured(self, seconds: float) -> None:
    self._expected, self._measured = seconds, True


class _Process:
  """What stop points of one process share, of all its loops.

  Attributes:
    number: number of the last stop point. After a notice, JAX waits for the
      number after the last that it was asked about.
    others_wait: whether all other processes wait for this one.
  """

  number = 0
  others_wait = False


def last_stop_point() -> int:
  """Returns the number of the last stop point in this process."""
  return _Process.number


def skip_to_stop_point(number: int) -> None:
  """Sets that number to the first process's, which `leave_if_asked` moves."""
  _Process.number = number


class StopPoints:
  """The points at which a run may stop, common to all of its processes."""

  def __init__(self):
    """Uses the handler that `handling_signals` installed, if any."""
    handler = signal.getsignal(signal.SIGINT)
    self._request = handler if isinstance(handler, StopRequest) else None

  def reached(self) -> bool:
    """Returns whether all processes should save and stop at this point.

    Every process must call this at every stop point, in the same order. Returns
    False if signals are not handled and JAX is not distributed, or if its
    preemption service is off.
    """
    _Process.number += 1
    if self._request is not None and jax.process_count() == 1:
      return self._request.requested
    try:
      return multihost_utils.reached_preemption_sync_point(_Process.number)
    except RuntimeError:  # the service is off
      return False

  def unsaved(self, whether: bool) -> None:
    if self._request is not None:
      self._request.unsaved = whether


@contextlib.contextmanager
def others_waiting() -> Iterator[None]:
  """Context of the first process in which all others wait for it.

  They then hear from it whether the run stops, and `last_stop_point()`.
  """
  before, _Process.others_wait = _Process.others_wait, True
  try:
    yield
  finally:
    _Process.others_wait = before


def leave_if_asked() -> None:
  """Ends a wait in `others_waiting`, which has nothing to save, on a notice.

  Of several processes, signals do not interrupt any: call this once a second.
  Elsewhere it does nothing, since others might be at other stop points.

  Raises:
    Preempted: any process was asked to stop.
  """
  if _Process.others_wait and StopPoints().reached():
    raise Preempted(NOTHING_SAVED)
