"""Command line of the benchmarks: starts workers, watches them, and sums up.

Every line that a worker prints is immediately written to the output and to a
file. A job that prints nothing for too long is killed, one that crashes its
process has failed, and the remaining jobs run in another process.
"""

import argparse
import json
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from kernels_pallas.bench import worker

PATIENCE = 150.0
"""Seconds in which a job, which compiles and compares, has to end."""

START = 120.0
"""Seconds in which a worker has to start."""

Lines = dict[str, dict[str, Any]]


def main(
  module: str,
  platform: str,
  make: Callable[[Any], list[Any]],
  arguments: list[str] | None,
  about: str,
) -> int:
  """Runs a benchmark's command; returns the exit code.

  Args:
    module: The command's module, which also runs workers.
    platform: 'gpu' or 'tpu'.
    make: Maps a `jobs.Target` to all jobs.
    arguments: Command line arguments.
    about: Description of the command.

  Returns: 0 if all jobs ran and passed, 1 if one failed, 2 if there was no time
    for all.
  """
  args = _parser(module, about).parse_args(arguments)
  if args.worker:
    worker.set_up(args.dry_run)
    done = set(read_results(args.to)) if args.to else set()
    budget = args.budget
    return worker.run_jobs(
      platform, make, args.dry_run, args.only, done, budget
    )
  with tempfile.TemporaryDirectory() as scratch:
    to = args.to or pathlib.Path(scratch, "lines.jsonl")
    command = [sys.executable, "-m", module, "--worker", f"--to={to}"]
    command += [f"--only={args.only}"] + ["--dry-run"] * args.dry_run
    return supervise(command, to, args.budget, args.patience)


def _parser(module: str, about: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"python -m {module}", description=about
  )
  add = parser.add_argument
  add("--dry-run", action="store_true",
      help="tiny shapes, interpreted, on the CPU")  # fmt: skip
  add("--only", default="", metavar="REGEX", help="run only matching jobs")
  add("--budget", type=float, metavar="SECONDS",
      help="time limit for all jobs; the rest are listed")  # fmt: skip
  add("--to", type=pathlib.Path, metavar="FILE",
      help="append results to this file; skip jobs that it "
      "contains")  # fmt: skip
  add("--patience", type=float, default=PATIENCE, metavar="SECONDS",
      help="time limit per job, after which it is killed")  # fmt: skip
  add("--worker", action="store_true", help=argparse.SUPPRESS)
  return parser


def read_results(file: pathlib.Path) -> Lines:
  """Reads a file's results by name; none if there is no file.

  Skips a truncated last line.

  Args:
    file: Path of the results.
  """
  found = {}
  for text in file.read_text().splitlines() if file.exists() else ():
    try:
      line = json.loads(text)
    except json.JSONDecodeError:
      continue
    if "name" in line:
      found[line["name"]] = line
  return found


def supervise(
  command: list[str],
  to: pathlib.Path,
  budget: float | None = None,
  patience: float = PATIENCE,
) -> int:
  """Runs workers until no job or no time is left; prints a summary.

  Args:
    command: Starts a worker, which skips the jobs in `to`.
    to: File to which lines are appended.
    budget: Seconds for all jobs; None for no limit.
    patience: Seconds per job.

  Returns:
    As in `main`.
  """
  start, planned = time.monotonic(), []
  deadline = None if budget is None else start + budget
  while True:
    rest = [] if deadline is None else [
      f"--budget={max(0.0, deadline - time.monotonic()):.0f}"]  # fmt: skip
    before = len(read_results(to))
    end = _watch([*command, *rest], to, deadline, patience, planned)
    late = deadline is not None and time.monotonic() >= deadline
    if end in (0, 1) or late or len(read_results(to)) == before:
      break
  return _summarize(to, planned, end, time.monotonic() - start)


def _watch(command, to, deadline, patience, planned) -> int:
  """Watches one worker from start to end; returns its exit code."""
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  lines: queue.Queue[str | None] = queue.Queue()

  def listen():
    for text in process.stdout:
      lines.put(text)
    lines.put(None)

  threading.Thread(target=listen, daemon=True).start()
  running, limit = None, time.monotonic() + max(START, patience)
  try:
    while True:
      now = time.monotonic()
      until = limit if deadline is None else min(limit, deadline)
      try:
        text = lines.get(timeout=max(0.0, until - now))
      except queue.Empty:
        if running is not None and time.monotonic() >= limit:
          _add(to, _failed(running, f"no end in {patience:g} s; killed"))
        return -1
      if text is None:
        code = process.wait()
        if running is not None:
          _add(to, _failed(running, f"its process ended with {code}"))
        return code
      line = _parsed(text)
      planned.extend(n for n in line.get("jobs", ()) if n not in planned)
      # Other output of a job, such as a compiler's, does not end it.
      running = line.get("start", running if "said" in line else None)
      limit = time.monotonic() + patience
      if "jobs" not in line and "start" not in line:
        _add(to, line)
  finally:
    process.kill()
    process.wait()


def _parsed(text: str) -> dict[str, Any]:
  try:
    line = json.loads(text)
  except json.JSONDecodeError:
    line = None
  return line if isinstance(line, dict) else {"said": text.rstrip()[:500]}


def _failed(name: str, reason: str) -> dict[str, Any]:
  return {"name": name, "ok": False, "reason": reason}


def _add(to: pathlib.Path, line: dict[str, Any]) -> None:
  """Writes a line to the output, and to the file, which survives crashes."""
  text = json.dumps(line)
  print(text, flush=True)
  with to.open("a") as file:
    file.write(text + "\n")


def _reason(line: dict[str, Any]) -> Any:
  """Returns why a job failed: its message, or its error ratio."""
  ours = line.get("ours", {}).get("reason")
  return line.get("reason", ours or line.get("error_ratio"))


def _summarize(to, planned, end, seconds: float) -> int:
  found = read_results(to)
  bad = {n: x for n, x in found.items() if not x.get("ok")}
  left = [name for name in planned if name not in found]
  summary = {
    "ok": not bad and not left and end == 0,
    "passed": len(found) - len(bad),
    "failed": {n: _reason(x) for n, x in bad.items()},
    "left": left,
    "seconds": round(seconds, 1),
  }
  print(json.dumps(summary), flush=True)
  if bad or (end != 0 and not left):
    return 1
  return 2 if left else 0
