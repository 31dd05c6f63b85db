"""Waits for the tasks of a checkpoint, and for those left when one failed."""

import asyncio
import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

from research.io import folders

PATIENCE = 10.0
"""Seconds in which tasks end after one has failed."""


class _Drained:
  """Has the tasks of an event loop end before it is closed."""

  def close(self) -> None:
    if not self.is_closed() and (left := asyncio.all_tasks(self)):
      ended = asyncio.gather(*left, return_exceptions=True)
      with contextlib.suppress(TimeoutError):
        self.run_until_complete(_within(ended, PATIENCE))
    super().close()

  def call_soon_threadsafe(
    self, callback: Callable[..., Any], *args: Any, context: Any = None
  ) -> Any:
    """Drops what a thread reports after the close: nothing waits for it.

    Returns a loop's handle, of which uvloop has a class of its own.
    """
    try:
      return super().call_soon_threadsafe(callback, *args, context=context)
    except RuntimeError:
      if not self.is_closed():
        raise
      return None


async def _within(ended: asyncio.Future, seconds: float) -> None:
  await asyncio.wait_for(ended, seconds)


@contextlib.contextmanager
def awaited() -> Iterator[None]:
  """Lets all tasks of Orbax end before it says that one has failed.

  Orbax reads and writes arrays as tasks of an event loop, which it closes at
  the first error. TensorStore's threads would then find it closed and print a
  traceback to stderr, as no one is left to raise to. Some report outside any
  task; what they report to a closed loop is dropped. Orbax takes its loops from
  asyncio, and those inside another from uvloop, where that is installed.
  """
  with contextlib.ExitStack() as stack:
    for name in ("asyncio", "uvloop"):
      with contextlib.suppress(ImportError):
        stack.enter_context(_drained(importlib.import_module(name)))
    yield


@contextlib.contextmanager
def _drained(module: Any) -> Iterator[None]:
  new_event_loop = module.new_event_loop
  loop_class = getattr(module, "Loop", asyncio.SelectorEventLoop)
  module.new_event_loop = type("DrainedLoop", (_Drained, loop_class), {})
  try:
    yield
  finally:
    module.new_event_loop = new_event_loop


class _Failures(logging.Handler):
  """Collects the errors that Orbax's threads log before they end."""

  def __init__(self):
    super().__init__(logging.ERROR)
    self.errors: list[BaseException] = []

  def emit(self, record: logging.LogRecord) -> None:
    if record.exc_info and record.exc_info[1] is not None:
      self.errors.append(record.exc_info[1])


@contextlib.contextmanager
def collect_errors() -> Iterator[Sequence[BaseException]]:
  """Yields the errors of Orbax's threads, which grow, and prints none of them.

  Inside, the logger named absl, which Orbax uses, has this handler alone.
  """
  logger, failures = logging.getLogger("absl"), _Failures()
  level, handlers, propagates = logger.level, logger.handlers, logger.propagate
  logger.handlers, logger.propagate = [failures], False
  logger.setLevel(logging.ERROR)
  try:
    yield failures.errors
  finally:
    logger.handlers, logger.propagate = handlers, propagates
    logger.setLevel(level)


def wait(
  response: Any, failures: Sequence[BaseException]
) -> BaseException | None:
  """Waits until a checkpoint is written by all processes.

  Orbax's processes meet several times in a save. Where the disk of one process
  is full, the others wait for it at their next meeting until that times out,
  and so does this process at another one.

  Args:
    response: response of an asynchronous save; None if there was nothing to
      save.
    failures: errors of this process's writers, see `collect_errors`.

  Returns:
    The error of a disk after which the save did not end in `PATIENCE` seconds;
    None if the save has ended.

  Raises:
    Exception: what the save raised.
  """
  if response is None:
    return None
  pool = futures.ThreadPoolExecutor(1, "checkpoint")
  saved = pool.submit(response.result)
  pool.shutdown(wait=False)
  while True:
    failed = [error for error in failures if folders.is_disk_error(error)]
    if futures.wait([saved], PATIENCE).done:
      saved.result()
      return None
    if failed:
      # What its threads log when their waits time out says no more.
      logging.getLogger("absl").disabled = True
      return failed[0]
