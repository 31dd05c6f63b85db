"""Starts runs in a blink: everything is imported once, then forked.

  python -m tests.crash.server < lines of "WORKDIR BIG"

Answers each with `pid N` when the run begins and `status N` when it ended, as
`os.waitstatus_to_exitcode` has it. JAX has no backend before the fork.
"""

import gc
import os
import pathlib
import sys
import traceback

from tests.crash import run


def _child(workdir: pathlib.Path, big: int) -> None:
  log = os.open(workdir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  try:
    run.main(workdir, big)
  except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
  os._exit(0)


def main() -> None:
  """Reads lines until there are no more."""
  gc.collect()
  gc.freeze()
  print("ready", flush=True)
  for line in sys.stdin:
    name, big = line.rsplit(maxsplit=1)
    pid = os.fork()
    if pid == 0:
      _child(pathlib.Path(name), int(big))
    print(f"pid {pid}", flush=True)
    _, status = os.waitpid(pid, 0)
    print(f"status {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
  main()
