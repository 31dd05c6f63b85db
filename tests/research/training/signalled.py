"""Processes that are sent signals: run by test_preemption, which reads it.

Each is a fork of this one, which has imported everything and started nothing.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time

from research.training import preemption

TERM, INT = signal.SIGTERM, signal.SIGINT


def python():
  """A process that executes Python code."""
  while True:
    time.sleep(0.01)


def compiled():
  """A process in native code that releases the GIL, like XLA."""
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def idle(points):
  """Has nothing to save."""
  python()


def compiling(points):
  """Has nothing to save, and executes no Python code."""
  compiled()


def training(points):
  """Has steps to save, and saves on request; exit status 7 means saved."""
  points.unsaved(True)
  while not points.reached():
    time.sleep(0.01)
  time.sleep(0.5)  # saves; the thread that watches speaks meanwhile
  os._exit(7)


def computing(points):
  """Has steps to save, and is in a long step."""
  points.unsaved(True)
  compiled()


def finishing(points):
  """Has saved everything, and is writing final files."""
  points.unsaved(True)
  points.unsaved(False)
  python()


def swallowing(points):
  """Catches every Exception as an error of its own work."""
  try:
    python()
  except Exception:
    os._exit(3)


def child(scenario, ready):
  try:
    with preemption.handling_signals():
      points = preemption.StopPoints()
      os.write(ready, b"x")
      scenario(points)
  except preemption.Preempted as error:
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(error.exit_status)
  os._exit(1)


def ends(scenario, signals, pause=0.9, patience=30):
  """Returns (exit status, seconds, output)."""
  told, tell = os.pipe()
  said, say = os.pipe()
  pid = os.fork()
  if not pid:
    os.dup2(say, 2)
    child(scenario, tell)
  os.read(told, 1)
  time.sleep(0.2)
  begin = time.monotonic()
  for i, number in enumerate(signals):
    time.sleep(pause if i else 0)
    os.kill(pid, number)
  limit = time.monotonic() + patience
  while not (found := os.waitpid(pid, os.WNOHANG))[0]:
    if time.monotonic() > limit:
      os.kill(pid, signal.SIGKILL)
    time.sleep(0.01)
  os.close(say)
  status = os.waitstatus_to_exitcode(found[1])
  return status, time.monotonic() - begin, os.read(said, 4096).decode()


SCENARIOS = {
  "idle term": (idle, [TERM]),
  "idle int": (idle, [INT]),
  "swallowing int": (swallowing, [INT]),
  "compiling term": (compiling, [TERM]),
  "compiling int": (compiling, [INT]),
  "training term": (training, [TERM]),
  "training int": (training, [INT]),
  "training both": (training, [TERM, INT]),
  "computing int int": (computing, [INT, INT]),
  "computing term term int int": (computing, [TERM, TERM, INT, INT]),
  "finishing term": (finishing, [TERM]),
  "computing int, bounced": (computing, [INT, INT], 0.1, 2),
}

if __name__ == "__main__":
  # Most of it is waiting: four at a time, each watched by a process of its own.
  with multiprocessing.get_context("fork").Pool(4) as pool:
    asked = {name: pool.apply_async(ends, x) for name, x in SCENARIOS.items()}
    print(json.dumps({name: x.get() for name, x in asked.items()}))
