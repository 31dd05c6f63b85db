"""Measures all rows of RESULTS.md's table of schedules: `make bench-chips`.

Each row is one kernel for one chip next to a reference, as measured by `python
-m kernels_pallas.inspect`: best blocks against best blocks, and the same blocks
against the same. Takes about 10 minutes on two idle cores.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time

from kernels_pallas.inspect import __main__ as command
from kernels_pallas.inspect import build, chips
from kernels_pallas.inspect.programs import Job
from kernels_pallas.inspect.report import Measurement

HEADER = (
  "chip", "direction", "ours", "{}", "ratio", "same blocks", "bound",
  "of the bound", "TFLOP/s", "fullest slot", "spills", "VMEM MiB",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
  """Prints progress, the table, and one line of JSON; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.inspect.bench", description=main.__doc__
  )
  add = parser.add_argument
  add("--targets", nargs="+", choices=list(chips.CHIPS),
      default=list(chips.CHIPS), metavar="CHIP")  # fmt: skip
  add("--compare", choices=list(command.REFERENCES), default="splash")
  args = parser.parse_args(arguments)
  problem = build.missing() or build.missing(args.compare)
  if problem is not None:
    print(f"kernels_pallas.inspect.bench: {problem}", file=sys.stderr)
    return 1
  rows, start = [], time.monotonic()
  cells = list(itertools.product(args.targets, ("forward", "backward")))
  for n, (target, direction) in enumerate(cells):
    print(f"[{n + 1}/{len(cells)}] {target} {direction}", flush=True)
    row = _row(target, direction, args.compare)
    if row is not None:
      rows.append(row)
  header = [name.format(args.compare) for name in HEADER]
  for cells in (header, ["---"] * len(header), *map(_cells, rows)):
    print("| " + " | ".join(cells) + " |")
  seconds = round(time.monotonic() - start)
  print(json.dumps({"rows": [vars(r) for r in rows], "seconds": seconds}))
  return 0


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table; bundles are per 1000 score elements.

  Attributes:
    target: The chip.
    direction: 'forward' or 'backward'.
    ours: Bundles of our kernel.
    reference: Bundles of the reference at its best blocks, or None.
    same: Bundles of the reference at our blocks, or None if it does not
    compile.
    bound: Bundles if the matrix units were always busy.
    share: Fraction of the bound that our kernel reaches.
    tflops: Predicted TFLOP/s of the chip.
    slot: The fullest slot, and how full it is.
    spills: Spills per grid step.
    vmem: VMEM in MiB.
  """

  target: str
  direction: str
  ours: float
  reference: float | None
  same: float | None
  bound: float
  share: float
  tflops: float
  slot: str
  spills: int
  vmem: float | None


def _row(target: str, direction: str, compare: str) -> Row | None:
  job = Job("flash_attention", target, direction, 0, 128, "bfloat16", ())
  ours = command.ours(job)
  if ours is None:
    return None
  theirs = command.references(ours, compare)
  best = min(theirs, key=lambda m: m.bundles, default=None)
  alike = command.similar_blocks(ours)
  same = next((m for m in theirs if tuple(m.job.blocks) == alike), None)
  slot, full = ours.limiting()
  credited = job.program.credited[direction]
  return Row(
    target=target,
    direction=direction,
    ours=round(ours.bundles, 3),
    reference=_bundles(best),
    same=_bundles(same),
    bound=round(chips.bound(job.chip, job.head_dim, credited), 3),
    share=round(ours.roofline_share, 3),
    tflops=round(ours.tflops, 1),
    slot=f"{slot} {full:.0%}",
    spills=ours.spills,
    vmem=None if ours.vmem is None else round(ours.vmem / 2**20, 1),
  )


def _bundles(found: Measurement | None) -> float | None:
  return None if found is None else round(found.bundles, 3)


def _cells(row: Row) -> list[str]:
  def ratio(other):
    return "none" if other is None else f"{row.ours / other:.2f}"

  theirs = "none" if row.reference is None else f"{row.reference:.2f}"
  share = "reached" if row.share >= 1 else f"{row.share:.0%}"
  return [
    row.target, row.direction, f"{row.ours:.2f}", theirs, ratio(row.reference),
    ratio(row.same), f"{row.bound:.2f}", share, f"{row.tflops:.0f}", row.slot,
    str(row.spills), str(row.vmem),
  ]  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
