"""Kills runs at random moments until they are done, and counts."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRAFT = "orbax-checkpoint-tmp"


class Server:
  """The process that starts runs, see `server`."""

  def __init__(self, process: subprocess.Popen):
    self._process = process
    self._expect("ready")

  def start(self, workdir: pathlib.Path, big: int = 1) -> int:
    """Starts or resumes the run in `workdir`; returns its process id."""
    workdir.mkdir(exist_ok=True)
    self._process.stdin.write(f"{workdir} {big}\n")
    self._process.stdin.flush()
    return int(self._expect("pid"))

  def wait(self) -> int:
    """Returns the exit status of the run that was started."""
    return int(self._expect("status"))

  def _expect(self, word: str) -> str:
    line = self._process.stdout.readline().split()
    if line[:1] != [word]:
      raise RuntimeError(f"the server says {line}, not {word}")
    return line[-1]


@contextlib.contextmanager
def started(
  module: str, cache: str | os.PathLike
) -> Iterator[subprocess.Popen]:
  """Starts a module that answers on its pipes; ends it and its children.

  Args:
    module: run by `python -m`.
    cache: folder of compiled programs.
  """
  environment = os.environ | dict(
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(cache),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    PYTHONWARNINGS="ignore",
  )
  with subprocess.Popen(
    [sys.executable, "-m", module],
    cwd=ROOT,
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def server() -> Iterator[Server]:
  """Starts a server; ends it and what it has started."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/xla"))
  with started("tests.crash.server", cache) as process:
    yield Server(process)


@dataclasses.dataclass
class Tally:
  """What was done to runs.

  Attributes:
    runs: ended, each equal to the undisturbed one.
    kills: of all.
    saving: kills that left a checkpoint half written.
    restarts: starts that found a workdir.
    at: kills by the last step that was saved then.
  """

  runs: int = 0
  kills: int = 0
  saving: int = 0
  restarts: int = 0
  at: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )


def steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints that are whole by their names."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def drafts(workdir: pathlib.Path) -> list[str]:
  """Returns the checkpoints in the making."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.is_dir() else []
  return [name for name in names if DRAFT in name]


def undisturbed(
  server: Server, workdir: pathlib.Path, big: int = 1
) -> tuple[dict, float]:
  """Returns the result of a run that nothing happens to, and its seconds."""
  begin = time.monotonic()
  server.start(workdir, big)
  _check(server.wait(), workdir)
  result = json.loads((workdir / "done.json").read_text())
  return result, time.monotonic() - begin


def kill_until_done(
  server: Server,
  workdir: pathlib.Path,
  expected: dict,
  seconds: float,
  draw: random.Random,
  tally: Tally,
  *,
  big: int = 1,
  most: int | None = None,
) -> None:
  """Starts one run again and again, until it ends or `most` kills are done.

  Args:
    server: of runs.
    workdir: of the run; does not exist.
    expected: the undisturbed run's result.
    seconds: that it takes.
    draw: source of the moments.
    tally: is added to.
    big: see `run.params`.
    most: kills in all, over all runs; then the run may end undisturbed.
  """
  while True:
    before = steps(workdir)
    tally.restarts += bool(before)
    pid = server.start(workdir, big)
    if most is None or tally.kills < most:
      _kill(pid, workdir, seconds, draw)
    status = server.wait()
    after = steps(workdir)
    if status == -signal.SIGKILL:
      tally.kills += 1
      tally.saving += bool(drafts(workdir))
      tally.at[after[-1] if after else 0] += 1
      # What was saved before is there still, or something later is.
      assert not before or after[-1] >= before[-1], (before, after)
      continue
    _check(status, workdir)
    found = json.loads((workdir / "done.json").read_text())
    # Killed after its last save, a run may not have removed what it need not
    # keep; it has nothing left to do, so it leaves that.
    more = set(found["steps"]) - set(expected["steps"])
    found["steps"] = [step for step in found["steps"] if step not in more]
    assert len(more) <= 1 and found == expected, _difference(found, expected)
    assert "damaged" not in (workdir / "log.txt").read_text()
    tally.runs += 1
    return


def _kill(
  pid: int, workdir: pathlib.Path, seconds: float, draw: random.Random
) -> None:
  """Kills a process at any moment or, every second time, within a save."""
  end = time.monotonic() + draw.uniform(0, 1.1 * seconds)
  within = draw.random() < 0.5
  pause = draw.uniform(0, 0.04)
  while time.monotonic() < end:
    if within and drafts(workdir):
      time.sleep(pause)
      break
    time.sleep(0.0005)
  # Its parent collects it later: until then the number is no one else's.
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGKILL)


def _check(status: int, workdir: pathlib.Path) -> None:
  if status:
    log = (workdir / "log.txt").read_text()
    raise AssertionError(f"{workdir}: status {status}\n{log[-3000:]}")


def _difference(found: dict, expected: dict) -> str:
  return "; ".join(
    f"{k}: {str(found[k])[:300]} is not {str(expected[k])[:300]}"
    for k in expected
    if found[k] != expected[k]
  )
