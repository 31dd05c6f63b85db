"""Kills runs at random moments, on tmpfs and on disk, and counts.

  python -m tests.crash.soak --kills=200 [--seed=0] [--folder=DIR ...]

The kills are shared out among the folders; each restart must succeed, and each
run must end bitwise as if nothing had happened. The last line is JSON.
"""

import argparse
import json
import pathlib
import random
import tempfile
import time

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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, action="append")
  args = parser.parse_args()
  places = args.folder or [p for p in PLACES if p.is_dir()]
  begin, tallies = time.monotonic(), {}
  with killing.server() as server:
    for i, place in enumerate(places):
      kills = (args.kills + i) // len(places)
      with tempfile.TemporaryDirectory(dir=place, prefix=".crash-") as name:
        folder = pathlib.Path(name)
        killing.undisturbed(server, folder / "cold")
        whole = killing.undisturbed(server, folder / "whole")
        tally = run(server, folder, *whole, kills=kills, seed=args.seed + i)
      print(f"{place}: {describe(tally)}", flush=True)
      tallies[str(place)] = vars(tally)
  total = sum(tally["kills"] for tally in tallies.values())
  seconds = time.monotonic() - begin
  print(json.dumps(dict(kills=total, seconds=seconds, places=tallies)))


if __name__ == "__main__":
  main()
