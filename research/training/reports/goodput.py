"""Goodput: accounts for the wall time of a run across restarts.

Goodput is the share of wall time spent on steps that were not lost. Time is
recorded in buckets that add up exactly to the wall time: each moment belongs to
the innermost `doing`, or to `other`. Totals are written to `metrics.jsonl` as
`goodput/<bucket>`, so that the next process, after a crash or a preemption,
continues from them. A loop uses it like this:

    clock = Goodput(started_at)             # time before this is `init`
    with clock.doing("init"):               # import the model, open the data
      ...
    with clock.doing("restore"):
      state = checkpoints.restore(...)
    clock.resume(workdir / "metrics.jsonl", step)  # before JsonlWriter opens it
    writer = JsonlWriter(workdir / "metrics.jsonl", step)
    writer.scalars(start, clock.summary())  # at once, to record lost steps
    with clock.doing("compile"):
      ...
    for number in range(start + 1, steps + 1):
      with clock.doing("data"):
        batch = next(batches)
      with clock.doing("step"):
        moving, values = update(...)
        late.push(number, values)
      # where the seconds of a step are known, i.e. in the callback of `late`:
      writer.scalars(number, {**values, "train/seconds": s, **clock.stepped(s)})
      if saving:
        with clock.doing("save"):
          checkpoints.save(...)
        writer.scalars(number, clock.summary())  # so that a kill loses little
    writer.scalars(steps, clock.summary())  # at the end, and in result.json

The training time is `seconds["step"] + seconds["data"]`. Waiting for data is
counted even while the device is still busy with the previous step; it is close
to zero if the pipeline keeps up.
"""

import bisect
import collections
import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from research.training.reports.metrics import read_jsonl
from research.typing import UserError

Bucket = Literal[
  "init",
  "compile",
  "restore",
  "data",
  "step",
  "save",
  "evaluate",
  "lost",
  "other",
]
BUCKETS: tuple[Bucket, ...] = Bucket.__args__
"""In the order of a run; `lost` are steps repeated because of a crash."""

WINDOW = 64
"""Number of recent steps that define a normal step time."""


class Goodput:
  """Measures wall time per bucket.

  Attributes:
    seconds: bucket -> seconds in this process, up to the last change.
  """

  def __init__(self, started_at: float | int | None = None):
    """Starts counting.

    Args:
      started_at: start time of this process, as from `time.time()`; the time
        since then is `init`. None for now.
    """
    self.seconds: dict[str, float] = dict.fromkeys(BUCKETS, 0.0)
    if started_at is not None:
      self.seconds["init"] = max(0.0, time.time() - started_at)
    self._doing: str = "other"
    self._since = time.perf_counter()
    self._earlier = {_name(bucket): 0.0 for bucket in BUCKETS}
    self._normal = SlowStepDetector()
    self._slow, self._lives = 0, 1

  @contextlib.contextmanager
  def doing(self, what: Bucket) -> Iterator[None]:
    """Context that counts its time as `what`, without nested contexts."""
    before = self._turn(what)
    try:
      yield
    finally:
      self._turn(before)

  def resume(self, metrics: str | os.PathLike, step: int | None) -> None:
    """Adds the totals of earlier processes from a metrics file.

    Args:
      metrics: the file, before `JsonlWriter` drops lines from it.
      step: the step that the run resumes from; None if it starts over.
    """
    try:
      records = read_jsonl(metrics)
    except UserError:
      if step is not None:
        raise
      records = []  # the file is about to be replaced
    if not records:
      return
    totals = earlier_totals(records, step)
    self._lives += int(totals.pop("goodput/lives"))
    self._slow += int(totals.pop("goodput/slow_steps"))
    self._earlier = totals

  def stepped(self, seconds: float) -> dict[str, int]:
    """Records a step time; returns `train/slow_step` if it is an outlier."""
    if not self._normal.is_slow(seconds):
      return {}
    self._slow += 1
    return {"train/slow_step": 1}

  def summary(self) -> dict[str, float]:
    """Returns the totals over all processes so far.

    Returns:
      `goodput/<bucket>` in seconds; `goodput/fraction`, the share of `step` in
      their sum; `goodput/slow_steps`, and `goodput/lives`, the number of
      processes.
    """
    self._turn(self._doing)
    total = {
      _name(bucket): self._earlier[_name(bucket)] + self.seconds[bucket]
      for bucket in BUCKETS
    }
    return {
      **total,
      "goodput/fraction": goodput_fraction(total),
      "goodput/slow_steps": self._slow,
      "goodput/lives": self._lives,
    }

  def _turn(self, what: str) -> str:
    """Switches to bucket `what`; returns the previous one."""
    now = time.perf_counter()
    before = self._doing
    self.seconds[before] += now - self._since
    self._doing, self._since = what, now
    return before


class SlowStepDetector:
  """Detects slow steps: slower than the recent median plus three MADs.

  MAD is the median absolute deviation from the median, which is robust to
  outliers. A step is compared with the previous ones, once there are ten.
  """

  def __init__(self, window: int = WINDOW, least: int = 10):
    self._last: collections.deque[float] = collections.deque()
    self._sorted: list[float] = []
    self._window, self._least = window, least

  def is_slow(self, seconds: float) -> bool:
    """Returns whether a step of `seconds` is slow, and records it."""
    known = self._sorted
    slow = False
    if len(known) >= self._least:
      middle = _median(known)
      # Skips the spread for the half of all steps below the median.
      if seconds > middle:
        spread = _median(sorted(abs(x - middle) for x in known))
        slow = seconds > middle + 3 * spread
    self._last.append(seconds)
    bisect.insort(known, seconds)
    if len(self._last) > self._window:
      known.pop(bisect.bisect_left(known, self._last.popleft()))
    return slow


def earlier_totals(
  records: Sequence[Mapping[str, Any]], step: int | None
) -> dict[str, float]:
  """Returns the totals of the processes that wrote `records`.

  Starts from the last totals in the records and adds the steps after them.
  Moves all steps after the one that is resumed from to `lost`.

  Args:
    records: records of a metrics file, in order; not empty.
    step: the step that is resumed from; None if all steps are lost.

  Returns:
    The entries of `Goodput.summary`, without `goodput/fraction`.
  """
  written = [i for i, r in enumerate(records) if "goodput/step" in r]
  last = written[-1] if written else -1
  base = records[last] if written else {}
  total = {_name(bucket): base.get(_name(bucket)) or 0.0 for bucket in BUCKETS}
  slow = base.get("goodput/slow_steps") or 0
  for i, record in enumerate(records):
    seconds = record.get("train/seconds") or 0.0
    if i > last:
      total["goodput/step"] += seconds
      slow += record.get("train/slow_step") or 0
    if step is None or record["step"] > step:
      # Bounded, because a step's seconds include its wait for data.
      moved = min(seconds, total["goodput/step"])
      total["goodput/step"] -= moved
      total["goodput/lost"] += moved
  lives = base.get("goodput/lives") or 1
  return {**total, "goodput/slow_steps": slow, "goodput/lives": lives}


def goodput_fraction(totals: Mapping[str, float]) -> float:
  """Returns the share of productive steps in the total wall time."""
  wall = sum(totals[_name(bucket)] for bucket in BUCKETS)
  return totals["goodput/step"] / wall if wall else 0.0


def _median(ordered: Sequence[float]) -> float:
  half = len(ordered) // 2
  return (ordered[half] + ordered[-1 - half]) / 2


def _name(bucket: str) -> str:
  return f"goodput/{bucket}"
