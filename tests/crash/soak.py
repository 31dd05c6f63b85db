"""Kills runs at random moments, lets other faults happen to them, and counts.

  python -m tests.crash.soak --kills=200 --minutes=30 [--seed=0] [--folder=DIR]

The kills are shared out among the folders, tmpfs and disk by default. For so
many minutes then, the faults of `faults` happen to runs of `train`. Each
restart must succeed, and each run must end bitwise as if nothing had happened:
the first that does not ends this with an error. The last line is JSON.
"""

import argparse
import json
import pathlib
import random
import tempfile
import time
from collections.abc import Sequence

from tests.crash import commands, faulty
from tests.crash import kills as killing
from tests.crash.kills import ROOT, Server, Tally

PLACES = (pathlib.Path("/dev/shm"), ROOT)


def run(
  server: Server,
  folder: pathlib.Path,
  expected: dict,
  seconds: float,
  *,
  kills: int,
  seed: int,
) -> Tally:
  """Returns what was done until so many kills had been done.

  Args:
    server: of runs.
    folder: for the workdirs.
    expected: the undisturbed run's result.
    seconds: that it takes.
    kills: how many.
    seed: of the moments.
  """
  draw, tally, number = random.Random(seed), Tally(), 0
  while tally.kills < kills:
    workdir = folder / f"run{number}"
    killing.kill_until_done(
      server, workdir, expected, seconds, draw, tally, most=kills
    )
    number += 1
  return tally


def describe(tally: Tally) -> str:
  """Returns the counts in words."""
  return (
    f"{tally.kills} kills, {tally.saving} of them within a save,"
    f" {tally.restarts} restarts, {tally.runs} runs ended, all bitwise equal"
  )


def kill(kills: int, seed: int, places: Sequence[pathlib.Path]) -> dict:
  """Kills runs in these folders so often; returns the counts."""
  tallies = {}
  with killing.server() as server:
    for i, place in enumerate(places):
      part = (kills + i) // len(places)
      with tempfile.TemporaryDirectory(dir=place, prefix=".crash-") as name:
        folder = pathlib.Path(name)
        killing.undisturbed(server, folder / "cold")
        whole = killing.undisturbed(server, folder / "whole")
        tally = run(server, folder, *whole, kills=part, seed=seed + i)
      print(f"{place}: {describe(tally)}", flush=True)
      tallies[str(place)] = vars(tally)
  total = sum(tally["kills"] for tally in tallies.values())
  return dict(kills=total, places=tallies)


def injure(minutes: float, seed: int, place: pathlib.Path) -> dict:
  """Lets faults happen to runs for so long; returns the counts."""
  with (
    tempfile.TemporaryDirectory(dir=place, prefix=".crash-") as name,
    commands.serving(pathlib.Path(name, "cache")) as serving,
  ):
    report = faulty.soak(serving, pathlib.Path(name), 60 * minutes, seed)
  print(f"{minutes:g} minutes: {report.describe()}", flush=True)
  return vars(report)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=0)
  parser.add_argument("--minutes", type=float, default=0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, action="append")
  args = parser.parse_args()
  places = args.folder or [p for p in PLACES if p.is_dir()]
  begin, found = time.monotonic(), {}
  if args.kills:
    found |= kill(args.kills, args.seed, places)
  if args.minutes:
    found |= injure(args.minutes, args.seed, places[-1])
  print(json.dumps(dict(seconds=time.monotonic() - begin, **found)))


if __name__ == "__main__":
  main()
