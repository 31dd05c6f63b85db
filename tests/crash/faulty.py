"""Runs that faults happen to until they are done, and the counts.

Each must end bitwise as the undisturbed run on as many processes: weights,
curves, evaluations, the best step and the checkpoints that are kept.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.crash import faults, run
from tests.crash.commands import Commands

SMALL = "size=32m"
"""Of a disk that fills up: several runs fit on it."""


@dataclasses.dataclass
class Report:
  """What was done to runs.

  Attributes:
    runs: that ended, each bitwise equal to the undisturbed one.
    restarts: starts that found a checkpoint.
    faults: how often each struck.
  """

  runs: int = 0
  restarts: int = 0
  faults: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def describe(self) -> str:
    """Returns the counts in words."""
    each = ", ".join(f"{n} x {name}" for name, n in sorted(self.faults.items()))
    return (
      f"{sum(self.faults.values())} faults ({each}), {self.restarts} restarts,"
      f" {self.runs} runs ended, all bitwise equal"
    )


def write_texts(path: pathlib.Path) -> None:
  """Writes the texts of all runs: 96 lines of words, of the same seed."""
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(20)]
  texts = [" ".join(draw.choices(words, k=12)) for _ in range(96)]
  path.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """A filesystem that can be filled; None without the right to mount one."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", SMALL, "none", str(folder)]
  if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
    yield None
    return
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns all of a finished run that is a function of its configuration."""
  result = json.loads((workdir / "result.json").read_text())
  weights = (workdir / "model" / "model.safetensors").read_bytes()
  return dict(
    weights=hashlib.sha256(weights).hexdigest(),
    numbers=run.numbers(workdir),
    best=result["best"],
    steps=faults.kills.steps(workdir),
  )


def assert_equal(found: dict[str, Any], expected: Mapping[str, Any]) -> None:
  """Asserts that two outcomes are bitwise the same run.

  Killed after its last save, a run may not have removed what it need not keep.
  """
  more = set(found["steps"]) - set(expected["steps"])
  found["steps"] = [step for step in found["steps"] if step not in more]
  different = [name for name in expected if found[name] != expected[name]]
  assert len(more) <= 1 and not different, (different, more, found, expected)


def expect(one: faults.Run) -> tuple[dict[str, Any], float]:
  """Returns the outcome of a run that nothing happens to, and its seconds.

  Its first seconds compile, so it is run twice, and must be equal.
  """
  found, workdir = [], one.workdir
  for name in ("cold", "warm"):
    begin = time.monotonic()
    one.workdir = workdir / name
    faults.undisturbed(one)
    found.append(outcome(one.workdir))
    seconds = time.monotonic() - begin
  assert_equal(found[1], found[0])
  return found[1], seconds


def injure(
  one: faults.Run,
  expected: Mapping[str, Any],
  kinds: Sequence[str],
  end: float,
  report: Report,
) -> None:
  """Lets faults happen to a run until it has ended, and compares it.

  Args:
    one: whose workdir does not exist.
    expected: the undisturbed run's outcome.
    kinds: of faults, by name; the rarest so far goes first, mostly.
    end: of `time.monotonic()`; then the run may end undisturbed.
    report: is added to.
  """
  done = one.workdir / "result.json"
  while not done.exists():
    report.restarts += bool(one.steps)
    if time.monotonic() > end:
      faults.undisturbed(one)
      continue
    order = sorted(
      kinds, key=lambda k: report.faults[k] + one.draw.expovariate(0.3)
    )
    for kind in order:
      try:
        report.faults[kind] += faults.FAULTS[kind](one)
        break
      except faults.NotPossible:
        continue
    else:
      faults.undisturbed(one)
  assert_equal(outcome(one.workdir), expected)
  report.runs += 1


def soak(
  commands: Commands,
  folder: pathlib.Path,
  seconds: float,
  seed: int,
  kinds: Sequence[str] = tuple(faults.FAULTS),
  processes: Sequence[int] = (1, 2),
) -> Report:
  """Lets faults happen to runs for so long; returns the counts.

  Args:
    commands: starts runs.
    folder: for the workdirs, on a disk.
    seconds: how long.
    seed: of what happens.
    kinds: of faults, by name.
    processes: numbers of processes that runs have.
  """
  draw, report, number = random.Random(seed), Report(), 0
  texts = folder / "texts.jsonl"
  write_texts(texts)
  with small_disk(folder / "small") as small:
    places = [folder, *([small] if small else [])]

    def new(name: str, count: int, place: pathlib.Path) -> faults.Run:
      return faults.Run(
        commands,
        place / name,
        texts,
        folder / f"{name}.log",
        expected[count][1] if count in expected else 10.0,
        draw,
        processes=count,
        small=place != folder,
      )

    expected: dict[int, tuple[dict[str, Any], float]] = {}
    for count in processes:
      (folder / f"whole{count}").mkdir()
      expected[count] = expect(new(f"whole{count}", count, folder))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      # A hang takes longest: fewer runs of several processes.
      count = processes[-1] if number % 4 == 3 else processes[0]
      one = new(f"run{number}", count, places[number % len(places)])
      injure(one, expected[count][0], kinds, end, report)
      subprocess.run(["rm", "-rf", str(one.workdir)], check=True)
      number += 1
  return report
