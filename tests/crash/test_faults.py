"""Faults that happen to `train` cost what was not saved, and nothing else.

`make soak` injects them for half an hour, into runs of one process and of two.
"""

import os
import random
import signal

import numpy as np
import pytest

from tests.crash import commands, faults, faulty


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
  with commands.serving(tmp_path_factory.mktemp("cache")) as started:
    yield started


@pytest.mark.slow
def test_every_fault_happens_and_nothing_is_lost(serving, tmp_path, capsys):
  """A minute of what `make soak` does for half an hour, to single processes.

  Of two, one hangs in the next test.
  """
  report = faulty.soak(serving, tmp_path, 60, seed=0, processes=(1,))
  missing = {"hung process"} | ({"full disk"} if os.geteuid() else set())
  assert set(report.faults) | missing == set(faults.FAULTS)
  assert all(report.faults[name] for name in set(faults.FAULTS) - missing)
  assert report.runs >= 2 and report.restarts >= 1
  with capsys.disabled():
    print(f"\n{report.describe()}")


def injured(serving, folder, seed=0, processes=1):
  """A run in a new folder, with its texts."""
  texts = folder / "texts.jsonl"
  faulty.write_texts(texts)
  workdir, log, draw = folder / "run", folder / "log", random.Random(seed)
  return faults.Run(serving, workdir, texts, log, 5.0, draw, processes)


@pytest.mark.slow
def test_a_hung_process_ends_the_other_and_nothing_is_lost(serving, tmp_path):
  """Most of its time, the other waits as long as a step may take."""
  one = injured(serving, tmp_path, processes=2)
  workdir, one.workdir = one.workdir, tmp_path / "whole"
  faults.undisturbed(one)
  expected, one.workdir = faulty.outcome(one.workdir), workdir
  assert faults.hung_process(one)
  assert one.steps and not (workdir / "result.json").exists()
  faults.undisturbed(one)
  faulty.assert_equal(faulty.outcome(workdir), expected)


def stop_at(one, step):
  """Lets a run go on until a step is saved, and asks it to stop."""
  one.start()
  assert one.until(lambda: (one.steps or [0])[-1] >= step, 300), one.said()
  one.signal(signal.SIGTERM, one.pids)
  assert one.wait() and one.statuses() == [42], one.said()


@pytest.mark.slow
def test_texts_that_changed_since_the_first_step_are_named(serving, tmp_path):
  """One letter, which leaves the file as valid as it was."""
  one = injured(serving, tmp_path)
  stop_at(one, 3)
  before, whole = one.steps, one.texts.read_text()
  one.texts.write_text(whole.replace("a", "b", 1))
  one.start()
  assert one.wait() and one.statuses() == [1], one.said()
  changed = f"the texts of data ({one.texts}) have changed since this run began"
  assert changed in one.said()
  assert "Restore the files" in one.said() and one.steps == before
  one.texts.write_text(whole)
  faults.undisturbed(one)


@pytest.mark.slow
def test_the_same_command_goes_on_with_other_numbers_of_devices(
  serving, tmp_path
):
  """DATA=-1 takes all devices there are: 4, then 2, then 1.

  Three do not divide a batch of four rows, which is said by name.
  """
  one = injured(serving, tmp_path)
  whole = injured(serving, tmp_path)
  whole.workdir = tmp_path / "whole"
  for each in (one, whole):
    each.data, each.devices = -1, 4
  faults.undisturbed(whole)
  stop_at(one, 4)
  saved, one.devices = one.steps, 3
  one.start()
  assert one.wait() and one.statuses() == [1]
  assert "batch_size: found 4 rows, expected a multiple of 3" in one.said()
  assert one.steps == saved
  one.devices = 2
  stop_at(one, saved[-1] + 3)
  one.devices = 1
  faults.undisturbed(one)
  found, expected = (faulty.outcome(each.workdir) for each in (one, whole))
  for row, other in zip(found["numbers"], expected["numbers"], strict=True):
    assert row.keys() == other.keys() and row["step"] == other["step"]
    for name in row:
      if name.endswith("loss"):
        # As in tests/multiprocess: other orders of sums in float32.
        np.testing.assert_allclose(row[name], other[name], rtol=1e-5)


def test_the_comparison_notices(tmp_path):
  """A bit of the weights, a number of the curve, two checkpoints too many."""
  expected = dict(weights="a", numbers=[{"step": 1}], best=[1, 2.0], steps=[5])
  faulty.assert_equal(dict(expected, steps=[4, 5]), expected)
  for other in (
    dict(weights="b"),
    dict(numbers=[{"step": 2}]),
    dict(best=[1, 2.1]),
    dict(steps=[3, 4, 5]),
    dict(steps=[]),
  ):
    with pytest.raises(AssertionError):
      faulty.assert_equal(expected | other, expected)
