"""Faults that happen to a run from outside, and what must come of each.

A fault is a function of a `Run` that starts one more attempt at it, interferes,
waits until all of its processes have ended and raises AssertionError where they
did not end as they should, or lost what had been saved. It returns whether it
struck: a process may be faster.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

from research.training.preemption import Preempted
from research.training.watchdog import EXIT_STATUS as STALLED
from tests.crash import kills
from tests.crash.commands import PATIENCE, Commands, Ended

CONFIG = pathlib.Path(__file__).with_name("command.gin")
STEPS = 16
"""Of `command.gin`."""

GRACE = 15.0
"""Seconds after which a launcher kills the processes that another has left."""

ROOM = 300_000
"""Bytes, at most, that are free on a disk that fills up: less than a run."""


class NotPossible(Exception):
  """This machine, or this moment of a run, has no such fault."""


@dataclasses.dataclass
class Run:
  """A run of `train`, and the attempts at it.

  Attributes:
    commands: starts it.
    workdir: of the run.
    texts: the file that it reads.
    log: what its processes have said, outside of the workdir.
    seconds: that it takes undisturbed, once it is compiled.
    draw: source of the moments and of what is damaged.
    processes: how many it has.
    devices: of each of them.
    data: size of the mesh's axis; None for all of them, as a number.
    small: whether the workdir's filesystem can be filled.
    pids: of the attempt's processes, in their order.
    ends: of those that have ended.
  """

  commands: Commands
  workdir: pathlib.Path
  texts: pathlib.Path
  log: pathlib.Path
  seconds: float
  draw: random.Random
  processes: int = 1
  devices: int = 1
  data: int | None = None
  small: bool = False
  pids: list[int] = dataclasses.field(default_factory=list)
  ends: list[Ended] = dataclasses.field(default_factory=list)
  _said: int = 0
  _saved: list[int] = dataclasses.field(default_factory=list)

  @property
  def steps(self) -> list[int]:
    """The steps that are saved."""
    return kills.steps(self.workdir)

  def start(self) -> None:
    """Starts the same command as ever."""
    self._said = self.log.stat().st_size if self.log.exists() else 0
    self._saved, self.ends = self.steps, []
    rows = self.processes * self.devices if self.data is None else self.data
    argv = [
      *("train", f"--config={CONFIG}", f"--workdir={self.workdir}"),
      f"--set=FILES={str(self.texts)!r}",
      f"--set=DATA={rows}",
      f"--devices={self.devices}",
    ]
    self.pids = self.commands.start(argv, self.log, self.processes)

  def said(self) -> str:
    """Returns what the processes of this attempt have said."""
    with self.log.open("rb") as file:
      file.seek(self._said)
      return file.read().decode("utf-8", "replace")

  def running(self) -> list[int]:
    """Returns the ids of the processes that have not ended, as far as known."""
    while self.pids and (one := self._ended(0.0)):
      self.ends.append(one)
    gone = {end.pid for end in self.ends}
    return [pid for pid in self.pids if pid not in gone]

  def signal(self, number: int, pids: list[int]) -> None:
    """Sends a signal to processes; to those that have ended it does nothing."""
    for pid in pids:
      # Their parent collects them when the next are started.
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

  def wait(self, seconds: float = PATIENCE) -> bool:
    """Waits for all processes; returns whether all have ended in time."""
    end = time.monotonic() + seconds
    while len(self.ends) < len(self.pids):
      one = self._ended(max(0.0, end - time.monotonic()))
      if one is None:
        return False
      self.ends.append(one)
    return True

  def wait_or_kill(self) -> None:
    """Waits for the first process, and kills what others are left after it.

    As launchers do, some seconds later.
    """
    end = time.monotonic() + PATIENCE
    while not self.ends and time.monotonic() < end:
      if one := self._ended(1.0):
        self.ends.append(one)
    if not self.wait(GRACE):
      self.signal(signal.SIGKILL, self.running())
      assert self.wait(), f"{self}: a killed process does not end"

  def until(self, reached: Callable[[], object], seconds: float = 60.0) -> bool:
    """Waits for a moment; returns whether it came while all were running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(self.running()) == len(self.pids):
      if reached():
        return True
      time.sleep(0.001)
    return False

  def moment(self) -> None:
    """Waits for any moment or, two times in three, for one within a save."""
    if self.draw.random() < 1 / 3:
      end = time.monotonic() + self.draw.uniform(0, 1.1 * self.seconds)
      self.until(lambda: time.monotonic() > end)
      return
    last = (self.steps or [0])[-1] + self.draw.randrange(STEPS // 2)
    pause = self.draw.uniform(0, 0.1)
    if self.until(
      lambda: (self.steps or [0])[-1] >= last and kills.drafts(self.workdir)
    ):
      time.sleep(pause)

  def statuses(self) -> list[int]:
    """Returns the statuses in the order of the processes."""
    found = {end.pid: end.status for end in self.ends}
    return [found[pid] for pid in self.pids]

  def check(self, good: bool) -> None:
    """Asserts that an attempt ended as it should, and that nothing is lost."""
    text = self.said()
    detail = f"{self.workdir}: {self.statuses()}\n{text[-4000:]}"
    assert good, detail
    assert "damaged" not in text, detail
    before, after = self._saved, self.steps
    assert not before or (after and after[-1] >= before[-1]), (
      f"saved {before}, then {after}\n{detail}"
    )

  def _ended(self, timeout: float) -> Ended | None:
    return self.commands.ended(timeout)


def undisturbed(run: Run) -> bool:
  """Lets the run go on to its end."""
  run.start()
  assert run.wait(), f"{run.workdir} does not end\n{run.said()[-4000:]}"
  run.check(not any(run.statuses()))
  return True


def sigkill(run: Run) -> bool:
  """Kills one process at any moment, as often as not within a save."""
  run.start()
  run.moment()
  victim = run.draw.choice(run.pids)
  run.signal(signal.SIGKILL, [victim])
  run.wait_or_kill()
  found = run.statuses()
  struck = found[run.pids.index(victim)] == -signal.SIGKILL
  run.check(struck or not any(found))
  return struck


def sigterm(run: Run) -> bool:
  """Asks all processes to stop; each saves and ends with 42."""
  run.start()
  run.moment()
  run.signal(signal.SIGTERM, run.pids)
  assert run.wait(), f"{run.workdir} does not stop\n{run.said()[-4000:]}"
  return _stopped(run)


def _stopped(run: Run) -> bool:
  found = set(run.statuses())
  run.check(found <= {Preempted.exit_status, 0})
  asked = Preempted.exit_status in found
  assert not asked or "asked to stop" in run.said()
  return asked


@contextlib.contextmanager
def _slow_file(path: pathlib.Path, seconds: float) -> Iterator[None]:
  """Puts a named pipe in a file's place, which gives it away in small parts."""
  kept, data = path.with_suffix(".kept"), path.read_bytes()
  over = threading.Event()

  def feed() -> None:
    parts = [data[i : i + 512] for i in range(0, len(data), 512)]
    into = None
    while into is None and not over.wait(0.01):
      try:
        into = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
      except OSError as error:
        if error.errno != errno.ENXIO:  # nobody reads it yet
          raise
    with contextlib.suppress(BrokenPipeError):  # its reader was killed
      for part in parts if into is not None else []:
        os.write(into, part)
        over.wait(seconds / len(parts))
    if into is not None:
      os.close(into)

  path.rename(kept)
  os.mkfifo(path)
  feeding = threading.Thread(target=feed, daemon=True)
  feeding.start()
  try:
    yield
  finally:
    over.set()
    feeding.join()
    kept.replace(path)


def slow_input(run: Run) -> bool:
  """Reads the texts from a slow pipe, stopped or killed meanwhile or not."""
  if run.processes > 1:
    raise NotPossible
  end = run.draw.choice([None, signal.SIGTERM, signal.SIGKILL])
  with _slow_file(run.texts, run.draw.uniform(0.5, 3.0)):
    run.start()
    if end is not None:
      run.moment()
      run.signal(end, run.pids)
    assert run.wait(), f"{run.workdir} does not end\n{run.said()[-4000:]}"
  if end == signal.SIGTERM:
    _stopped(run)
  run.check(run.statuses()[0] in (0, Preempted.exit_status, -signal.SIGKILL))
  return True


def _damage(data: bytes, draw: random.Random, begun: bool) -> bytes | None:
  """Returns a damaged file, or None for one that is gone.

  Before the first step a run can only find what is no text at all.
  """
  kind = draw.choice(["gone", "zeros", *(["cut", "bit"] if begun else [])])
  at = draw.randrange(len(data))
  if kind == "gone":
    return None
  if kind == "cut":
    return data[:at]
  size = 1 if kind == "bit" else 512
  part = data[at : at + size]
  other = bytes([part[0] ^ 1 << draw.randrange(8)]) if size == 1 else None
  return data[:at] + (other or bytes(len(part))) + data[at + size :]


def corrupted_input(run: Run) -> bool:
  """Damages the texts: the run names them, and goes on once they are whole."""
  before, whole = run.steps, run.texts.read_bytes()
  # A run that has read all of its texts from a pipe has no hash of them.
  begun = bool(before) and (run.workdir / "corpus.json").exists()
  if before and not begun:
    raise NotPossible
  damaged = _damage(whole, run.draw, begun)
  kept = run.texts.with_suffix(".kept")
  run.texts.rename(kept)
  try:
    if damaged is not None:
      run.texts.write_bytes(damaged)
    run.start()
    run.wait_or_kill()
  finally:
    kept.replace(run.texts)
  text = run.said()
  named = "error: " in text and str(run.texts) in text
  named &= "Traceback" not in text
  run.check(named and all(run.statuses()) and run.steps == before)
  return True


def full_disk(run: Run) -> bool:
  """Fills the workdir's disk at any moment, often within a save."""
  if not run.small:
    raise NotPossible
  filler = run.workdir.parent / "filler"
  run.start()
  run.moment()
  free = os.statvfs(run.workdir.parent)
  size = free.f_bavail * free.f_frsize - run.draw.randrange(ROOM)
  try:
    with filler.open("wb") as file, contextlib.suppress(OSError):
      os.posix_fallocate(file.fileno(), 0, max(size, 1))
    assert run.wait(), f"{run.workdir} does not end\n{run.said()[-4000:]}"
  finally:
    filler.unlink()
  text, found = run.said(), run.statuses()
  # Of several processes, one may end by JAX, as another has left it.
  struck = 1 in found and "error: " in text and "No space left" in text
  run.check(not any(found) or (struck and "Traceback" not in text))
  return struck


def hung_process(run: Run) -> bool:
  """Stops one of several processes: the others say which, and end with 43."""
  if run.processes == 1 or (run.steps and run.steps[-1] > STEPS - 6):
    raise NotPossible
  run.start()
  before = run.steps[-1] if run.steps else 0
  # While it trains: in the loop all are watched.
  if not run.until(lambda: (run.steps or [0])[-1] > before, PATIENCE):
    run.wait_or_kill()
    run.check(not any(run.statuses()))
    return False
  time.sleep(run.draw.uniform(0, 0.05))
  hung = run.draw.randrange(run.processes)
  run.signal(signal.SIGSTOP, [run.pids[hung]])
  end = time.monotonic() + PATIENCE
  others = [pid for i, pid in enumerate(run.pids) if i != hung]
  while set(others) & set(run.running()) and time.monotonic() < end:
    time.sleep(0.05)
  left = run.running()
  run.signal(signal.SIGKILL, left)
  assert run.wait(), f"{run}: a killed process does not end"
  found = run.statuses()
  named = f"process {hung} of {run.processes}: " in run.said()
  expected = [STALLED] * run.processes
  expected[hung] = -signal.SIGKILL
  run.check(found == expected and named and "stalled: " in run.said())
  return True


FAULTS: dict[str, Callable[[Run], bool]] = {
  "SIGKILL": sigkill,
  "SIGTERM": sigterm,
  "full disk": full_disk,
  "slow input": slow_input,
  "corrupted input": corrupted_input,
  "hung process": hung_process,
}
"""What a run must survive, by its name in reports."""
