"""Signs of life: when a line comes, and what it says."""

import time

import pytest

from research import progress


class Clock:
  """Seconds that pass when a test says so."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def listened(monkeypatch):
  """A listener whose time the test has in hand: (listener, clock, lines)."""
  lines, clock = [], Clock()
  listener = progress.Listener(lines.append, clock)
  token = progress._LISTENER.set(listener)
  yield listener, clock, lines
  progress._LISTENER.reset(token)


def run(listener, clock, seconds):
  for _ in range(seconds):
    clock.now += 1
    listener.tick()


def test_lines_come_late_and_further_and_further_apart(listened):
  listener, clock, lines = listened
  with progress.phase("compiling"):
    run(listener, clock, 9)
    assert lines == []
    run(listener, clock, 300)
  seconds = [10, 25, 48, 82]  # after gaps of 10, 15, 22.5 and 33.75
  assert lines[:4] == [f"compiling: {n} s" for n in seconds]
  assert lines[4:] == [f"compiling: {n} min" for n in (2, 3, 4)]
  run(listener, clock, 300)
  assert len(lines) == 7  # nothing goes on


def test_parts_are_counted_and_the_rest_estimated(listened):
  listener, clock, lines = listened
  for _ in progress.track(range(4), "reading"):
    run(listener, clock, 11)
  assert lines == [
    "reading: 0 of 4, 10 s",
    "reading: 2 of 4, 25 s, about 25 s to go",
  ]
  assert list(progress.track(iter("ab"), "reading")) == ["a", "b"]


def test_the_innermost_phase_speaks_and_none_is_silent(listened):
  listener, clock, lines = listened
  with progress.phase("outer"):
    with progress.phase(None):
      run(listener, clock, 100)
      with progress.phase("inner"):
        run(listener, clock, 9)
        assert lines == []
        run(listener, clock, 51)
    assert lines and all(line.startswith("inner: ") for line in lines)
    # A new piece of work is not silent for as long as the last one was.
    lines.clear()
    run(listener, clock, 11)
  assert [line.split(":")[0] for line in lines] == ["outer"]


def test_a_phase_ends_with_an_error(listened):
  listener, clock, lines = listened
  with pytest.raises(ZeroDivisionError), progress.phase("failing"):
    raise ZeroDivisionError
  run(listener, clock, 60)
  assert lines == []


def test_a_thread_listens(monkeypatch):
  monkeypatch.setattr(progress, "FIRST", 0.01)
  monkeypatch.setattr(progress, "_POLL", 0.005)
  lines = []
  with progress.report_to(lines.append, "working"):
    deadline = time.monotonic() + 30
    while not lines and time.monotonic() < deadline:
      time.sleep(0.01)
  assert lines[0] == "working: 0 s"
  assert list(progress.track("ab", "silent")) == ["a", "b"]


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (7200, "2 h")],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
