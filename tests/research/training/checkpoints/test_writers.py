"""Writers that have not ended when one failed."""

import asyncio
import threading

import pytest

from research.training.checkpoints import writers


async def _fails():
  raise OSError("No space left on device")


def _write(ended):
  """Writes as Orbax does: in a loop that it closes at the first error."""
  loop = asyncio.new_event_loop()
  late = loop.create_future()

  async def succeeds():
    await late
    ended.append(1)

  async def write():
    await asyncio.gather(_fails(), succeeds())

  def finish():
    loop.call_soon_threadsafe(late.set_result, None)

  threading.Timer(0.05, finish).start()
  try:
    loop.run_until_complete(write())
  finally:
    loop.close()


def test_all_end_before_the_first_error_is_raised():
  before, ended = asyncio.new_event_loop, []
  with pytest.raises(OSError, match="No space left"), writers.awaited():
    _write(ended)
  assert ended == [1]
  assert asyncio.new_event_loop is before


def test_one_that_never_ends_is_left(monkeypatch):
  monkeypatch.setattr(writers, "PATIENCE", 0.01)

  async def write():
    await asyncio.gather(_fails(), asyncio.sleep(100))

  with pytest.raises(OSError, match="No space left"), writers.awaited():
    loop = asyncio.new_event_loop()
    try:
      loop.run_until_complete(write())
    finally:
      loop.close()
  assert loop.is_closed()


def test_a_loop_without_errors_is_closed_at_once():
  with writers.awaited():
    loop = asyncio.new_event_loop()
  assert loop.run_until_complete(asyncio.sleep(0, "done")) == "done"
  loop.close()
  loop.close()
  assert loop.is_closed()
