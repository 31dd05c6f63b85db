"""Waits for the writers of a checkpoint that have not ended when one failed."""

import asyncio
import contextlib
from collections.abc import Iterator

PATIENCE = 10.0
"""Seconds in which writers end after one has failed."""


class _DrainedLoop(asyncio.SelectorEventLoop):
  """An event loop whose tasks end before it is closed."""

  def close(self) -> None:
    if not self.is_closed() and (left := asyncio.all_tasks(self)):
      ended = asyncio.gather(*left, return_exceptions=True)
      with contextlib.suppress(TimeoutError):
        self.run_until_complete(_within(ended, PATIENCE))
    super().close()


async def _within(ended: asyncio.Future, seconds: float) -> None:
  await asyncio.wait_for(ended, seconds)


@contextlib.contextmanager
def awaited() -> Iterator[None]:
  """Lets all writers of Orbax end before it says that one has failed.

  Orbax writes arrays as tasks of an event loop, which it closes at the first
  error. TensorStore's threads then find it closed, and each prints a traceback
  to stderr, as no one is left to raise to.
  """
  new_event_loop = asyncio.new_event_loop
  asyncio.new_event_loop = _DrainedLoop
  try:
    yield
  finally:
    asyncio.new_event_loop = new_event_loop
