"""Starts `train` in a blink, as one process or as several of one run.

  python -m tests.crash.commands < lines of JSON

A line has `argv`, the command's; `log`, which receives what its processes say;
and `processes`. Everything is imported once, then forked; JAX has no backend
before. It answers `pids N ...` when they run, and `ended PID STATUS` for each.
"""

import contextlib
import gc
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.crash import kills

PATIENCE = 300.0
"""Seconds in which each process of a run ends; else that is a failure."""


class Ended(NamedTuple):
  """How a process ended: its id, its status, negative for a signal."""

  pid: int
  status: int


class Commands:
  """The client of the process that starts commands."""

  def __init__(self, process: subprocess.Popen):
    self._process = process
    self._lines: queue.Queue[list[str]] = queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()
    self._expect("ready", PATIENCE)

  def start(
    self, argv: Sequence[str], log: os.PathLike, processes: int = 1
  ) -> list[int]:
    """Starts a command; returns the ids of its processes.

    Args:
      argv: the command line of `train`.
      log: receives its output, after what is there.
      processes: how many it has.
    """
    line = json.dumps(dict(argv=argv, log=str(log), processes=processes))
    self._process.stdin.write(f"{line}\n")
    self._process.stdin.flush()
    return [int(x) for x in self._expect("pids", PATIENCE)]

  def ended(self, timeout: float = PATIENCE) -> Ended | None:
    """Waits for one of its processes to end; None after `timeout` seconds."""
    with contextlib.suppress(queue.Empty):
      return Ended(*map(int, self._expect("ended", timeout)))
    return None

  def _read(self) -> None:
    for line in self._process.stdout:
      self._lines.put(line.split())

  def _expect(self, word: str, timeout: float) -> list[str]:
    line = self._lines.get(timeout=timeout)
    if line[:1] != [word]:
      raise RuntimeError(f"the server says {line}, not {word}")
    return line[1:]


@contextlib.contextmanager
def serving(cache: os.PathLike) -> Iterator[Commands]:
  """Starts a server; ends it and what it has started.

  Args:
    cache: folder of compiled programs. Its own, as JAX does not write them in
      one move: a killed process leaves parts, which no other is to read.
  """
  with kills.started("tests.crash.commands", cache) as process:
    yield Commands(process)


def _child(argv: Sequence[str], log: str) -> None:
  """Runs a command as `python -m experiments.train` does; never returns."""
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(out, 1)
  os.dup2(out, 2)
  status = 70
  try:
    from experiments import train
    from experiments.core import cli, runtime

    sys.argv = list(argv)
    flags = ["--nohuge_pages", "--notypecheck"]
    runtime.prepare(flags, resumes=True)
    # The signal of a moment in which its parent had blocked it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    cli.run(train.main)
  except SystemExit as ended:
    status = ended.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _flags(processes: int) -> list[list[str]]:
  """Returns the flags of each process that tell it from the others."""
  if processes == 1:
    return [[]]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  run = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
  return [[*run, f"--process={i}"] for i in range(processes)]


def _serve(order: dict[str, Any]) -> list[int]:
  """Starts a command and reports its ends; returns its processes.

  They are not collected yet: a number that is to be killed is no one else's.
  """
  pids = []
  for flags in _flags(order["processes"]):
    pid = os.fork()
    if pid == 0:
      _child([*order["argv"], *flags], order["log"])
    pids.append(pid)
  print("pids", *pids, flush=True)
  left, how = set(pids), os.WEXITED | os.WNOWAIT | os.WNOHANG
  while left:
    for pid in sorted(left):
      if end := os.waitid(os.P_PID, pid, how):
        exited = end.si_code == os.CLD_EXITED
        status = end.si_status if exited else -end.si_status
        print("ended", pid, status, flush=True)
        left.remove(pid)
    time.sleep(0.002)
  return pids


def main() -> None:
  """Reads lines until there are no more."""
  import experiments.core.config
  import experiments.stages.running
  import experiments.train  # noqa: F401

  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
  gc.collect()
  gc.freeze()
  print("ready", flush=True)
  ended: list[int] = []
  for line in sys.stdin:
    for pid in ended:
      os.waitpid(pid, 0)
    ended = _serve(json.loads(line))


if __name__ == "__main__":
  main()
