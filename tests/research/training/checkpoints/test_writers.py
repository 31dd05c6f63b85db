"""Tasks of a checkpoint that have not ended when one failed."""

import asyncio
import importlib
import logging
import threading

import pytest

from research.training.checkpoints import writers


async def _fails():
  raise OSError("No space left on device")


def _write(ended, loop):
  """Writes as Orbax does: in a loop that it closes at the first error."""
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


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_all_end_before_the_first_error_is_raised(name):
  if name == "uvloop":
    pytest.importorskip(name, reason="Orbax installs it, but on Windows")
  module = importlib.import_module(name)
  before, ended = module.new_event_loop, []
  with pytest.raises(OSError, match="No space left"), writers.awaited():
    _write(ended, module.new_event_loop())
  assert ended == [1]
  assert module.new_event_loop is before


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


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_a_report_to_a_closed_loop_is_dropped(name):
  module = pytest.importorskip(name, reason="Orbax installs it, but on Windows")
  with writers.awaited():
    loop = module.new_event_loop()
  assert not loop.call_soon_threadsafe(print, "early").cancelled()
  loop.close()
  assert loop.call_soon_threadsafe(print, "late") is None


def test_a_loop_without_errors_is_closed_at_once():
  with writers.awaited():
    loop = asyncio.new_event_loop()
  assert loop.run_until_complete(asyncio.sleep(0, "done")) == "done"
  loop.close()
  loop.close()
  assert loop.is_closed()


FULL = OSError(28, "No space left on device")


class _Response:
  """A save that ends when `ended` is set, with an error or without."""

  def __init__(self, error=None):
    self.ended, self._error = threading.Event(), error

  def result(self):
    self.ended.wait(60)
    if self._error is not None:
      raise self._error


def test_errors_of_other_threads_are_heard_and_not_printed(capfd):
  def fail():
    try:
      raise FULL
    except OSError:
      logging.getLogger("absl").exception("a writer failed")

  with writers.collect_errors() as failures:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
  assert failures == [FULL] and capfd.readouterr() == ("", "")
  assert logging.getLogger("absl").propagate


@pytest.mark.parametrize("failures", [[FULL], [ValueError("odd")], []])
def test_a_save_that_waits_after_a_full_disk_is_abandoned(
  monkeypatch, failures
):
  """One that is slow without such an error is waited for."""
  monkeypatch.setattr(writers, "PATIENCE", 0.05)
  logger = logging.getLogger("absl")
  monkeypatch.setattr(logger, "disabled", False)
  response = _Response()
  ends = threading.Timer(60 if failures == [FULL] else 0.3, response.ended.set)
  ends.start()
  found = writers.wait(response, failures)
  assert found == (FULL if failures == [FULL] else None)
  assert logger.disabled == (found is FULL)  # of the threads that are left
  ends.cancel()
  response.ended.set()


def test_what_a_save_raises_is_raised():
  response = _Response(FULL)
  response.ended.set()
  with pytest.raises(OSError, match="No space left"):
    writers.wait(response, [])
  assert writers.wait(None, []) is None
