"""Starts a command several times over, as the processes of one run."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class Done(NamedTuple):
  """How a process ended."""

  status: int
  out: str
  err: str


def launch(
  command: Sequence[str],
  processes: int = 2,
  devices: int = 2,
  timeout: float = 170,
  during: Callable[[list[subprocess.Popen]], None] = lambda running: None,
  compiled_before: bool = True,
) -> list[Done]:
  """Returns how the processes of `python *command` ended.

  Args:
    command: takes the flags of `experiments.core.cli.cluster`.
    processes: how many.
    devices: virtual CPU devices of each.
    timeout: seconds; then all are killed, with whatever they started.
    during: called with the running processes.
    compiled_before: whether they may take programs from JAX's cache.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  running = [
    subprocess.Popen(
      [
        *(sys.executable, *command),
        f"--devices={devices}",
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={processes}",
        f"--process={i}",
      ],
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(compiled_before).lower(),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      cwd=_ROOT,
    )
    for i in range(processes)
  ]
  try:
    during(running)
    ends = [p.communicate(timeout=timeout) for p in running]
  finally:
    for p in running:
      with contextlib.suppress(ProcessLookupError):
        if p.poll() is None:
          os.killpg(p.pid, signal.SIGKILL)
  return [Done(p.returncode, *e) for p, e in zip(running, ends, strict=True)]


def catches_sigterm(pid: int) -> bool:
  """Whether a process has a handler, by the mask that Linux shows (proc(5))."""
  text = pathlib.Path(f"/proc/{pid}/status").read_text()
  mask = int(text.partition("SigCgt:")[2].split()[0], 16)
  return bool(mask >> (signal.SIGTERM - 1) & 1)
