"""Goodput: every second is in one bucket, also across restarts."""

import time

import numpy as np
import pytest

from research.training.reports import goodput, metrics
from research.training.reports.goodput import BUCKETS, Goodput, SlowStepDetector
from research.typing import UserError


@pytest.fixture
def clock(monkeypatch):
  """A clock that advances only explicitly."""
  now = [1000.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(time, "time", lambda: now[0])

  def wait(seconds):
    now[0] += seconds

  return wait


def life(clock, path, done, *, dies, resumed, slow=1.0):
  """Trains to step `dies` as the module's docstring says; saves each second."""
  goods = Goodput(time.time())
  with goods.doing("restore"):
    clock(3)
  goods.resume(path, resumed)
  writer = metrics.JsonlWriter(path, resumed)
  writer.scalars(done, goods.summary())
  for number in range(done + 1, dies + 1):
    with goods.doing("data"):
      clock(0.25)
    with goods.doing("step"):
      clock(slow)
    spent = {"train/seconds": slow + 0.25}
    writer.scalars(number, {**spent, **goods.stepped(slow + 0.25)})
    if number % 2 == 0:
      with goods.doing("save"):
        clock(0.5)
      writer.scalars(number, goods.summary())
  writer.close()
  return goods.summary()


def test_every_moment_is_in_the_innermost_bucket(clock):
  began = time.time()
  clock(5)
  goods = Goodput(began)
  clock(1)
  with goods.doing("evaluate"):
    clock(2)
    with goods.doing("compile"):
      clock(10)
    clock(4)
  with pytest.raises(KeyError), goods.doing("save"):
    clock(7)
    raise KeyError
  clock(1)
  found = goods.summary()
  expected = dict.fromkeys(BUCKETS, 0.0) | {
    "init": 5,
    "evaluate": 6,
    "compile": 10,
    "save": 7,
    "other": 2,
  }
  assert goods.seconds == expected
  assert {b: found[f"goodput/{b}"] for b in BUCKETS} == expected
  assert sum(goods.seconds.values()) == time.time() - began
  assert found["goodput/fraction"] == 0 and found["goodput/lives"] == 1


def test_a_crash_loses_what_is_repeated_and_nothing_else(clock, tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole = time.time()
  life(clock, path, 0, dies=5, resumed=None)  # saved at 4; 5 is lost
  life(clock, path, 4, dies=5, resumed=4)  # lost again, before any save
  found = life(clock, path, 4, dies=8, resumed=4)
  # 8 steps counted, 5 twice lost with its wait for data.
  assert found["goodput/lost"] == pytest.approx(2 * 1.25)
  assert found["goodput/step"] == pytest.approx(8)
  assert found["goodput/restore"] == pytest.approx(9)
  assert found["goodput/save"] == pytest.approx(4 * 0.5)
  assert found["goodput/lives"] == 3
  wall = sum(found[f"goodput/{b}"] for b in BUCKETS)
  assert wall == pytest.approx(time.time() - whole)
  assert found["goodput/fraction"] == pytest.approx(8 / wall)


def test_a_run_without_a_checkpoint_loses_all(clock, tmp_path):
  path = tmp_path / "metrics.jsonl"
  life(clock, path, 0, dies=1, resumed=None)
  found = life(clock, path, 0, dies=4, resumed=None)
  assert found["goodput/lost"] == pytest.approx(1.25)
  assert found["goodput/step"] == pytest.approx(4)


def test_a_damaged_checkpoint_takes_back_what_was_counted(clock, tmp_path):
  path = tmp_path / "metrics.jsonl"
  life(clock, path, 0, dies=4, resumed=None)
  assert life(clock, path, 2, dies=2, resumed=2)["goodput/lost"] == 2.5


def test_a_kill_between_a_save_and_its_totals():
  """Steps in the checkpoint count even if no total includes them yet."""
  records = [{"step": 0, "goodput/step": 0.0, "goodput/init": 7.0}]
  records += [{"step": s, "train/seconds": 1.0} for s in (1, 2, 3)]
  total = goodput.earlier_totals(records, 2)
  assert total["goodput/step"] == 2 and total["goodput/lost"] == 1
  assert total["goodput/init"] == 7


def test_runs_from_before_goodput_count_their_steps():
  records = [
    {"step": 0, "compile/seconds": 2.0},
    {"step": 1, "train/seconds": 3.0, "train/loss": None},
    {"step": 2, "train/seconds": 4.0, "train/slow_step": 1},
  ]
  total = goodput.earlier_totals(records, 1)
  assert total["goodput/step"] == 3 and total["goodput/lost"] == 4
  assert total["goodput/slow_steps"] == 1 and total["goodput/lives"] == 1


def test_an_unreadable_file_matters_only_when_it_is_needed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("no JSON\n")
  Goodput().resume(path, None)
  with pytest.raises(UserError, match="not a record of a step"):
    Goodput().resume(path, 3)
  Goodput().resume(tmp_path / "none.jsonl", None)


def test_slow_steps_are_those_beyond_three_deviations():
  """Against numpy, over a series with outliers."""
  rng = np.random.default_rng(0)
  series = rng.gamma(20.0, 0.05, 300)
  series[::37] *= 3
  normal, window = SlowStepDetector(window=25), 25
  for i, seconds in enumerate(series):
    before = series[max(0, i - window) : i]
    slow = False
    if len(before) >= 10:
      middle = np.median(before)
      mad = np.median(np.abs(before - middle))
      slow = seconds > middle + 3 * mad
    assert normal.is_slow(float(seconds)) == slow, i


def test_slow_steps_are_flagged_and_counted():
  goods = Goodput()
  marks = [goods.stepped(s) for s in [9.0] + [1.0, 1.1] * 6 + [5.0, 1.0]]
  assert marks[-2:] == [{"train/slow_step": 1}, {}]
  assert not any(marks[:-2])  # the first is slow, but nothing says so yet
  assert goods.summary()["goodput/slow_steps"] == 1


def test_counting_costs_microseconds():
  goods = Goodput()
  begin = time.perf_counter()
  for i in range(2000):
    with goods.doing("data"):
      pass
    with goods.doing("step"):
      pass
    goods.stepped(1.0 + (i * 7919 % 101) / 1000)
  # About 15 us here; a hundred times that is still nothing to a step.
  assert (time.perf_counter() - begin) / 2000 < 1.5e-3
