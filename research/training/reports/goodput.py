"""What a run's time went to, over all of its processes' lives.

Goodput is the share of wall time that was spent on steps which counted. Time
is kept in buckets that add up to the wall time exactly: each moment belongs to
the innermost `doing`, or to `other`. Totals go into `metrics.jsonl` as
`goodput/<bucket>`, so that the next process, after a crash or a preemption,
goes on counting from there. A loop uses it like this:

    clock = Goodput(started_at)                  # what came before is `init`
    with clock.doing("init"):               # import the model, open the data
      ...
    with clock.doing("restore"):
      state = checkpoints.restore(...)
    clock.resume(workdir / "metrics.jsonl", step)  # before JsonlWriter opens it
    writer = JsonlWriter(workdir / "metrics.jsonl", step)
    writer.scalars(start, clock.summary())  # at once: what is lost stays known
    with clock.doing("compile"):
      ...
    for number in range(start + 1, steps + 1):
      with clock.doing("data"):
        batch = next(batches)
      with clock.doing("step"):
        moving, values = update(...)
        late.push(number, values)
      # where the seconds of a step are known, i.e. in what `late` calls:
      writer.scalars(number, {**values, "train/seconds": s, **clock.stepped(s)})
      if saving:
        with clock.doing("save"):
          checkpoints.save(...)
        writer.scalars(number, clock.summary())  # a kill then loses little
    writer.scalars(steps, clock.summary())  # at the end, and in result.json

The time of training is `seconds["step"] + seconds["data"]`. A wait for data is
counted while the device may still be busy with the step before; a pipeline
that keeps up makes it nothing.
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
"""In the order of a run; `lost` is steps that a crash made a run repeat."""

WINDOW = 64
"""How many of the last steps say what is normal."""


class Goodput:
  """Seconds by what was being done.

  Attributes:
    seconds: bucket -> seconds in this process, up to the last change.
  """

  def __init__(self, started_at: float | int | None = None):
    """Starts counting.

    Args:
      started_at: when this process began, in seconds as `time.time()` has them; the
        time since then is `init`. None for now.
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
    """Adds the time spent inside to `what`, less what is done further in."""
    before = self._turn(what)
    try:
      yield
    finally:
      self._turn(before)

  def resume(self, metrics: str | os.PathLike, step: int | None) -> None:
    """Adds what earlier processes wrote into a metrics file.

    Args:
      metrics: the file, before `JsonlWriter` drops lines from it.
      step: which step is resumed from; None where all begins anew.
    """
    try:
      records = read_jsonl(metrics)
    except UserError:
      if step is not None:
        raise
      records = []  # about to be replaced anyway
    if not records:
      return
    found = earlier_totals(records, step)
    self._lives += int(found.pop("goodput/lives"))
    self._slow += int(found.pop("goodput/slow_steps"))
    self._earlier = found

  def stepped(self, seconds: float) -> dict[str, int]:
    """Takes note of a step; returns `train/slow_step` if it was an outlier."""
    if not self._normal.is_slow(seconds):
      return {}
    self._slow += 1
    return {"train/slow_step": 1}

  def summary(self) -> dict[str, float]:
    """Returns totals over all processes so far.

    Returns:
      `goodput/<bucket>` in seconds; `goodput/fraction`, the share of `step` in
      their sum; `goodput/slow_steps` and `goodput/lives`, counts.
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
    """Does `what` from now on; returns what was done until now."""
    now = time.perf_counter()
    before = self._doing
    self.seconds[before] += now - self._since
    self._doing, self._since = what, now
    return before


class SlowStepDetector:
  """What a step takes: the median of the last ones, and three MADs more.

  MAD is the median absolute deviation from the median, which outliers do not
  move. A step is judged by those before it, once there are ten.
  """

  def __init__(self, window: int = WINDOW, least: int = 10):
    """Remembers `window` steps and judges from the `least`-th on."""
    self._last: collections.deque[float] = collections.deque()
    self._sorted: list[float] = []
    self._window, self._least = window, least

  def is_slow(self, seconds: float) -> bool:
    """Whether a step of `seconds` is slow; takes it into account."""
    known = self._sorted
    slow = False
    if len(known) >= self._least:
      middle = _median(known)
      # Half of all steps are no slower than that: no need to look further.
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

  The last totals among them say what was counted. Steps that came after were
  not yet; steps after the one that is resumed from are lost, whether they were
  counted or not.

  Args:
    records: of a metrics file, in its order; not empty.
    step: which step is resumed from; None loses all of them.

  Returns:
    The names of `Goodput.summary`, but for `goodput/fraction`.
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
      # No more than there is: a step's seconds include its wait for data.
      moved = min(seconds, total["goodput/step"])
      total["goodput/step"] -= moved
      total["goodput/lost"] += moved
  lives = base.get("goodput/lives") or 1
  return {**total, "goodput/slow_steps": slow, "goodput/lives": lives}


def goodput_fraction(totals: Mapping[str, float]) -> float:
  """Returns the share of steps that counted in all of the time."""
  wall = sum(totals[_name(bucket)] for bucket in BUCKETS)
  return totals["goodput/step"] / wall if wall else 0.0


def _median(ordered: Sequence[float]) -> float:
  half = len(ordered) // 2
  return (ordered[half] + ordered[-1 - half]) / 2


def _name(bucket: str) -> str:
  return f"goodput/{bucket}"
