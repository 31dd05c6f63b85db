"""The watchdog: on a clock of the test's, and once on a run that hangs."""

import json
import pathlib

import pytest

from research.training import loop, watchdog
from research.typing import UserError
from tests.multiprocess.launcher import launch


@pytest.fixture
def three(tmp_path):
  """Three processes' watchdogs, on one clock: `(watchdogs, now)`."""
  now = [0.0]
  dogs = [
    watchdog.Watchdog(tmp_path, i, 3, 60, clock=lambda: now[0])
    for i in range(3)
  ]
  (tmp_path / watchdog.FOLDER).mkdir()
  return dogs, now


def ticks(dogs):
  for dog in dogs:
    dog.tick()  # files are written before they are read
  return [dog.tick() for dog in dogs]


def test_it_names_the_one_that_stops_the_others(three):
  dogs, now = three
  for dog in dogs:
    dog.doing("reading the batch of step 1")
    dog.doing("computing step 1", "update 1")
    dog.doing("reading the batch of step 2")
  for dog in (dogs[0], dogs[2]):
    dog.doing("computing step 2", "update 2")
  assert ticks(dogs) == [None] * 3
  now[0] = 59.0
  assert ticks(dogs) == [None] * 3
  now[0] = 61.0
  said = ticks(dogs)
  assert said == [said[0]] * 3
  assert said[0] == (
    "no process has made progress for 61 s.\n"
    "process 1 of 3: reading the batch of step 2; its last collective: update 1"
  )


def test_progress_of_any_process_is_progress(three):
  dogs, now = three
  ticks(dogs)
  now[0] = 50.0
  dogs[2].doing("compiling")
  assert ticks(dogs) == [None] * 3
  now[0] = 109.0
  assert ticks(dogs) == [None] * 3
  now[0] = 111.0
  # Those that do not know yet what to do have come least far.
  assert "process 0 of 3: starting; its last collective: none" in ticks(dogs)[2]


def test_what_an_earlier_run_has_left_does_not_count(three, tmp_path):
  """Process 2 hangs before it watches, and came far in the run before."""
  dogs, now = three
  left = {"count": 9, "doing": "computing step 9", "collective": "update 9"}
  (tmp_path / watchdog.FOLDER / "2.json").write_text(json.dumps(left))
  watchdog.clear(tmp_path)
  for dog in dogs[:2]:
    dog.doing("restoring")
  ticks(dogs[:2])
  now[0] = 61.0
  assert "process 2 of 3: starting" in ticks(dogs[:2])[0]
  watchdog.clear(tmp_path / "new")


def test_a_file_that_cannot_be_read_is_no_change(three, tmp_path):
  dogs, now = three
  dogs[1].doing("compiling")
  ticks(dogs)
  now[0] = 61.0
  (tmp_path / watchdog.FOLDER / "1.json").write_text("{torn")
  assert "process 1" not in dogs[0].tick()


def test_it_watches_only_where_there_are_others(tmp_path):
  for processes, patience in ((1, 60), (2, None)):
    with watchdog.Watchdog(tmp_path, 0, processes, patience) as dog:
      dog.doing("compiling")
      assert dog.activity.count == 1
  assert not (tmp_path / watchdog.FOLDER).exists()
  with pytest.raises(UserError, match="stalled_after: found 0"):
    loop.TrainConfig(steps=1, stalled_after=0)


# Process 1 hangs as it reads its fifth batch.
HANGS = """
import sys, time
from experiments.core import cli, runtime
from research.data import pipeline
from experiments import train
FLAGS = train.FLAGS
class Hanging:
  def __init__(self, inner):
    self.inner, self.count = inner, 0
  def __iter__(self):
    return self
  def __next__(self):
    import jax
    self.count += 1
    if self.count == 5 and jax.process_index() == 1:
      time.sleep(600)
    return next(self.inner)
before = pipeline.Pipeline.training
pipeline.Pipeline.training = lambda *a, **k: Hanging(iter(before(*a, **k)))
cli.run(train.main)
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_that_hangs_ends_on_every_process(tmp_path):
  config = pathlib.Path(__file__).parents[2] / "multiprocess" / "tiny.gin"
  done = launch(
    [
      *("-c", HANGS, f"--config={config}", f"--workdir={tmp_path / 'run'}"),
      *("--set=DATA=2", "--set=FSDP=2"),
      "--set=loop.TrainConfig.stalled_after=40",
    ]
  )
  for process in done:
    assert process.status == watchdog.EXIT_STATUS == 43, process.err
    (line,) = [x for x in process.err.splitlines() if x.startswith("process ")]
    assert line.startswith("process 1 of 2: reading the batch of step")
  last = json.loads((tmp_path / "run" / "watchdog" / "0.json").read_text())
  assert last["doing"].startswith("computing step")
