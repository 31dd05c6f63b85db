"""Runs cases in a process of its own, under limits; a JSON line for each.

  python -m tests.fuzz.worker FOLDER < case ids, one a line

A case is a number: it decides the target and the damage. A line goes out
before each case and one after it, so that whoever started this process knows
what it was doing when it died.
"""

import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import traceback

FAULT = "HEPTAD_FUZZ_FAULT"
SECONDS = 5
MEMORY = 1 << 30


def case(number: int) -> tuple[str, random.Random]:
  """Returns a case's target and its source of randomness."""
  from tests.fuzz.targets import TARGETS

  r = random.Random(number)
  names = list(TARGETS)
  shares = [TARGETS[name].share for name in names]
  return r.choices(names, shares)[0], r


def damaged(number: int) -> tuple[str, bytes]:
  """Returns a case's target and its damaged file."""
  from tests.fuzz.targets import TARGETS

  name, r = case(number)
  target = TARGETS[name]
  data = (target.source() / target.file).read_bytes()
  return name, target.mutate(r, data)


def attempt(name: str, data: bytes, folder: pathlib.Path) -> dict:
  """Returns how reading `data` in place of a target's file ended."""
  from research.typing import UserError
  from tests.fuzz.targets import TARGETS

  target = TARGETS[name]
  place = folder / name
  if not place.exists():
    shutil.copytree(target.source(), place)
  # A file of its own each time: the last one may still be mapped.
  (place / target.file).unlink(missing_ok=True)
  (place / target.file).write_bytes(data)
  # Seconds of this process: others may have the processor meanwhile.
  start = time.process_time()
  try:
    target.run(place)
    outcome, error = "read", ""
  except UserError as e:
    outcome, error = "refused", str(e)
    if not 0 < len(error) < 4000 or error.count("\n") > 2:
      outcome = "FAILED"
  except BaseException as e:
    last = traceback.extract_tb(e.__traceback__)[-1]
    where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
    outcome, error = "FAILED", f"{type(e).__name__} at {where}: {e}"[:600]
  seconds = time.process_time() - start
  if seconds > SECONDS:
    outcome, error = "FAILED", f"{seconds:.1f} s; {error}"
  return dict(target=name, outcome=outcome, error=error[:600], seconds=seconds)


def _limit() -> None:
  """Lets the process grow by `MEMORY` from here on, and no further."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  size = pages * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (size, size))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
  """Reads numbers, writes results."""
  from tests.fuzz.targets import TARGETS

  folder = pathlib.Path(sys.argv[1])
  numbers = [int(line) for line in sys.stdin.read().split()]
  # Whatever is loaded once is loaded before anything is limited or timed.
  for name, target in TARGETS.items():
    data = (target.source() / target.file).read_bytes()
    good = attempt(name, data, folder)
    if good["outcome"] != "read":
      raise SystemExit(f"the good file of {name} is not read: {good['error']}")
  if sys.platform.startswith("linux"):
    _limit()
  fault = os.environ.get(FAULT)
  if fault:  # tests of this file only: every reader of config.json fails so
    broken = dataclasses.replace(TARGETS["config"], run=lambda _: exec(fault))
    TARGETS["config"] = broken
  for number in numbers:
    name, data = damaged(number)
    print(json.dumps(dict(begin=number, target=name)), flush=True)
    # Hangs, too, and even where no Python runs any more.
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    result = attempt(name, data, folder)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(dict(case=number) | result), flush=True)


if __name__ == "__main__":
  main()
