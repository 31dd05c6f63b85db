"""How soon commands answer: help, errors, the first line of work.

  make bench ARGS=start  # or start_help, start_error_train

Each measurement is a process of its own with warm bytecode and compilation
cache: a first one is not counted. Seconds are the median of the others: of all
output, or of the first line on stdout or stderr of work.

  start_help_X    `--help` of command X
  start_error_X   the slowest error about a path, a flag, a macro or a name
                  among those of `tests/experiments/test_start.py`
  start_work_X    an example on small models and data
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.experiments import test_start

ROOT = pathlib.Path(__file__).resolve().parents[2]
AIMS = {"help": 1, "error": 2, "work": 3}  # seconds
WORK = {x.split()[0]: x for x in test_start.WORK}
"""Cheap examples, by command."""

ROWS = (
  *(f"start_help_{x}" for x in test_start.COMMANDS),
  *(f"start_error_{x}" for x in test_start.COMMANDS),
  *(f"start_work_{x}" for x in WORK),
)


def commands(row: str) -> list[str]:
  """Returns the command lines of a row."""
  _, kind, name = row.split("_")
  if kind == "help":
    return [f"{name} --help"]
  if kind == "work":
    return [WORK[name]]
  errors = test_start.ERRORS | test_start.LATER
  return [x for x in errors if x.split()[0] == name]


def seconds(command: str, kind: str) -> float:
  """Returns how long a command takes to answer.

  Raises:
    SystemExit: an error that is not expected, or none that is.
  """
  # Output as on a terminal, and bytecode.
  settings = dict(PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="")
  pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  pipe |= dict(cwd=ROOT, env=os.environ | settings, errors="replace")
  with tempfile.TemporaryDirectory() as folder:
    name, *words = command.replace("{new}", f"{folder}/new").split()
    line = [sys.executable, "-m", f"experiments.{name}", *words]
    begin = time.perf_counter()
    process = subprocess.Popen(line, **pipe)
    lines = filter(str.strip, process.stdout)
    output = next(lines, "") if kind == "work" else "".join(lines)
    spent = time.perf_counter() - begin
    process.terminate()
    output += process.communicate()[0]
  if ("error: " in output) != (kind == "error") or not output:
    raise SystemExit(f"{command}: expected its {kind}, got {output!r}")
  return spent


def rows(names, peers: str, repeats: int) -> list[dict]:
  """Returns each row's seconds, its slowest command, and its aim."""
  del peers
  results = []
  for row in names:
    kind, medians = row.split("_")[1], {}
    for command in commands(row):
      spent = [seconds(command, kind) for _ in range(1 + repeats)][1:]
      medians[command] = round(statistics.median(spent), 2)
    slowest = max(medians, key=medians.get)
    result = dict(row=row, seconds=medians[slowest], aim=AIMS[kind])
    result |= dict(kept=result["seconds"] <= AIMS[kind], command=slowest)
    results.append(result)
    print(f"  {row}: {result['seconds']} s", file=sys.stderr, flush=True)
  return results


def show(results: list[dict]) -> str:
  """Returns the table as Markdown, and which rows miss their aims."""
  lines = [
    "| row | s | aim | kept | command |",
    "| --- | --- | --- | --- | --- |",
  ]
  for r in results:
    cells = [r["row"], r["seconds"], r["aim"], "yes" if r["kept"] else "NO"]
    lines.append(f"| {' | '.join(map(str, cells))} | `{r['command']}` |")
  missed = [r["row"] for r in results if not r["kept"]]
  return "\n".join([*lines, "", f"Missed: {', '.join(missed) or 'none'}."])
