"""Units of work, as launchers see them, and the lock of a sweep's folder."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

from research.training.preemption import Preempted
from research.typing import UserError

PREEMPTED = Preempted.exit_status
"""Exit status of a run that stopped and saved on request."""

TERMINATED = 128 + signal.SIGTERM
"""Exit status, to a shell, of a command that SIGTERM ended before it could
answer: it had nothing to save."""

LOCK = "sweep.lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A command to run.

  Attributes:
    name: of the unit.
    config: a gin file that is complete.
    workdir: the command's; a run resumes if it exists.
    log: the file for the command's output.
    program: the command, `train` for `experiments.train`.
    options: further flags of it.
  """

  name: str
  config: pathlib.Path
  workdir: pathlib.Path
  log: pathlib.Path
  program: str = "train"
  options: tuple[str, ...] = ()

  @property
  def result(self) -> pathlib.Path:
    """The file that gets the command's result, beside its configuration."""
    return self.config.with_suffix(".json")

  @property
  def arguments(self) -> list[str]:
    """What follows Python: the module and its flags."""
    files = [f"--config={self.config}", f"--result={self.result}"]
    if self.program != "evaluate":  # there it is the run to evaluate
      files.insert(1, f"--workdir={self.workdir}")
    return ["-m", f"experiments.{self.program}", *files, *self.options]

  @property
  def command(self) -> list[str]:
    """The command that starts the unit, and resumes it after a preemption."""
    return [sys.executable, *self.arguments]


class Events:
  """What a launcher says about its units; each method may be overridden."""

  def started(self, work: Work) -> None:
    """A unit starts."""

  def retried(self, work: Work, status: int) -> None:
    """A unit has failed for the first time, and will run once more."""

  def ended(self, work: Work, status: int, seconds: float) -> None:
    """A unit has ended for good, with this exit status, after its last try."""

  def tick(self) -> None:
    """Some time has passed."""


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[int]:
  """Makes this process the only one that runs units in a sweep's folder.

  Units inherit the descriptor that is yielded, so that the folder stays locked
  until the last one has ended, whatever happened to the sweep.

  Raises:
    UserError: another sweep, or a unit of one that was killed, runs there.
  """
  path = workdir / LOCK
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Appended to, since opening must not erase another sweep's number.
    file = path.open("a+")
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        raise UserError(
          f"{path}: cannot be locked ({error.strerror}).\nExpected a file"
          " system with locks, which keep two sweeps apart; use another"
          " --workdir."
        ) from error
      file.seek(0)
      owner = file.read().strip() or "unknown"
      raise UserError(
        f"{workdir}: process {owner} runs this sweep, or has left units that"
        " still run.\nExpected one sweep at a time; wait for it, or end it: its"
        " units save and end with it."
      ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    yield file.fileno()
