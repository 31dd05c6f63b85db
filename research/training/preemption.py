"""Being asked to leave: SIGTERM or Ctrl-C, in one process of many or the only.

Schedulers send SIGTERM some seconds before they kill. A run that hears it saves
at the next of the points where it asks, and ends; the same command goes on.

* A process alone (`handling_signals`) hears both signals itself. While it has
  nothing to save (it loads, compiles, writes its last files), it ends at once.
* Of several processes JAX's coordination service tells all of whichever heard a
  SIGTERM, and they agree on a point to end at, which is why all ask at the same
  points. Ctrl-C becomes a SIGTERM.

A second Ctrl-C ends a process at once, whatever it loses.
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
"""What a process ends with upon a second Ctrl-C: 128 and SIGINT's number."""

SIGINT_DEBOUNCE = 0.5
"""Seconds in which a second Ctrl-C is the same one, passed on by a parent."""

GRACE_SECONDS = 2.0
"""Seconds after which a process that only computes is ended from aside."""

_NOTHING = "asked to stop; nothing had to be saved.\nThe same command goes on."


class Preempted(UserError):
  """The run has been saved and ended early, since it was asked to."""

  exit_status = 42
  """What a command ends with, so that a launcher starts it again."""


class Interrupted(BaseException):
  """Raised where a signal finds nothing to save; no `except` of ours stops it.

  Like KeyboardInterrupt: an Exception out of nowhere would be taken for an
  error of whatever was just being done.
  """


class StopRequest:
  """A signal handler that remembers.

  Attributes:
    asked: whether a signal came.
    unsaved: whether ending now would lose a step.
  """

  def __init__(self, alone: bool):
    """Hears for itself, or for the service of several processes."""
    self.asked = False
    self.unsaved = False
    self._alone = alone
    self._raised = False

  def __call__(self, number: int, frame: FrameType | None) -> None:
    """Handles a signal, in the main thread, as soon as that runs Python."""
    first, self.asked = not self.asked, True
    if not self._alone:
      if number == signal.SIGINT and first:
        os.kill(os.getpid(), signal.SIGTERM)
    elif not self.unsaved and not self._raised:
      self._raised = True
      raise Interrupted

  def watch(self, pipe: int) -> None:
    """Handles what cannot wait for the main thread; see `handling_signals`.

    Args:
      pipe: gets the number of each signal, and a 0 in the end.
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
    """Ends a process that has nothing to save, and runs no Python."""
    time.sleep(GRACE_SECONDS)
    if self._alone and not (self.unsaved or self._raised or self.asked):
      _say(f"preempted: {_NOTHING}")
      os._exit(Preempted.exit_status)


def _say(text: str) -> None:
  # Not through a buffer that the main thread may be in the middle of.
  with contextlib.suppress(OSError):
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


@contextlib.contextmanager
def handling_signals() -> Iterator[None]:
  """Makes SIGTERM and Ctrl-C ask the run inside to save and end.

  Python's handlers run between two lines of Python in the main thread, which
  may be compiling for minutes; so a thread hears of each signal, too. In
  another thread than the main one nothing is caught.

  Raises:
    Preempted: instead of what a signal raised that found nothing to save.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  alone = jax.process_count() == 1
  asked = StopRequest(alone)
  # Of several processes, JAX's own handler of SIGTERM stays.
  numbers = [signal.SIGINT, *([signal.SIGTERM] if alone else [])]
  out, into = os.pipe()
  os.set_blocking(into, False)
  watching = threading.Thread(target=asked.watch, args=(out,), daemon=True)
  watching.start()
  woken = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
  before = {n: signal.signal(n, asked) for n in numbers}
  try:
    yield
  except Interrupted:
    raise Preempted(_NOTHING) from None
  finally:
    for n, handler in before.items():
      signal.signal(n, handler or signal.SIG_DFL)
    signal.set_wakeup_fd(woken)
    os.write(into, b"\0")
    watching.join()
    os.close(out)
    os.close(into)


class StopPoints:
  """Where a run asks whether to end: the same for all of its processes."""

  def __init__(self):
    """Finds the handler that `handling_signals` installed, if it did."""
    found = signal.getsignal(signal.SIGINT)
    self._asked = found if isinstance(found, StopRequest) else None
    self._number = 0

  def reached(self) -> bool:
    """Whether all processes, being at this point, shall save and end now.

    Every process asks at every point, in the same order. False where nothing
    is caught and JAX is not distributed, or its preemption service is off.
    """
    self._number += 1
    if self._asked is not None and jax.process_count() == 1:
      return self._asked.asked
    try:
      return multihost_utils.reached_preemption_sync_point(self._number)
    except RuntimeError:  # the service is off
      return False

  def unsaved(self, whether: bool) -> None:
    """Says whether ending at once would lose a step from now on."""
    if self._asked is not None:
      self._asked.unsaved = whether
