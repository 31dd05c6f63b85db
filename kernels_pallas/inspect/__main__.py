"""The command: one kernel on one chip, beside the reference if asked."""

import argparse
import dataclasses
import json
import pathlib
import sys

from kernels_pallas.flash_attention.tpu import tpu_tile_sizes
from kernels_pallas.inspect import (
  build,
  chips,
  gpu,
  picture,
  programs,
  report,
  search,
)
from kernels_pallas.inspect.programs import Job
from kernels_pallas.inspect.report import Measurement

REFERENCES = {
  # (q, kv, kv part, fused).
  "splash": {
    "forward": (
      (2048, 2048, 256, 0), (2048, 2048, 512, 0), (1024, 1024, 256, 0),
    ),
    "backward": (
      (1024, 1024, 512, 1), (1024, 1024, 1024, 1), (1024, 1024, 1024, 0),
    ),
  },
  "tokamax": {
    "forward": (
      (2048, 2048, 256, 1), (2048, 2048, 512, 1), (1024, 1024, 256, 1),
    ),
    "backward": ((1024, 1024, 512, 1), (1024, 1024, 1024, 1)),
  },
}  # fmt: skip
"""Blocks at which a reference is read; the best of them count."""


def main(arguments: list[str] | None = None) -> int:
  """Prints a table, then one line of JSON; returns the exit code."""
  arguments = sys.argv[1:] if arguments is None else arguments
  if gpu.asked(arguments):
    return gpu.main(arguments)
  args = _parser().parse_args(arguments)
  problem = build.missing()
  if problem is not None:
    print(f"kernels_pallas.inspect: {problem}", file=sys.stderr)
    return 1
  job = Job(
    maker=args.kernel,
    target=args.target,
    direction=args.direction,
    length=0,
    head_dim=args.head_dim,
    dtype=args.dtype,
    blocks=(),
    backward=args.backward,
  )
  blocks = _blocks(args.blocks) if args.blocks else ()
  best = _search(job) if args.search else ours(job, blocks, args.keep)
  if best is None:
    return 1
  theirs = []
  if args.compare and (absent := build.missing(args.compare)):
    print(f"{args.compare}: {absent}", flush=True)
  elif args.compare:
    theirs = references(best, args.compare, args.keep)
  reference = min(theirs, key=lambda m: m.bundles, default=None)
  if args.picture:
    chosen = [best] if reference is None else [best, reference]
    picture.draw([s for m in chosen for s in m.schedules], args.picture)
    print(f"picture: {args.picture}")
  print(json.dumps(summary(best, reference)))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.inspect",
    description=__doc__,
    epilog="GPUs have flags of their own: see --target=h100 --help (a100, "
    "h100 or b200). Needs libtpu, for GPUs JAX's CUDA plugin: `make "
    "test-chips` makes .venv-chips, which has both.",
  )
  add = parser.add_argument
  kernels = [name for name in programs.PROGRAMS if name not in REFERENCES]
  add("--kernel", choices=kernels, default=kernels[0])
  add("--target", choices=list(chips.CHIPS), required=True)
  add("--direction", choices=["forward", "backward"], default="forward")
  add("--compare", choices=list(REFERENCES), help="read the reference, too")
  add("--head_dim", type=int, choices=[64, 128, 256], default=128)
  add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
  add("--blocks", help="our tile: q,kv,q_part,kv_part")
  add("--backward", choices=["fused", "split"], default="fused")
  add(
    "--search",
    action="store_true",
    help="find the best tile, and write it where the kernels read it",
  )
  add("--picture", type=pathlib.Path, help="PNG of the schedule")
  add("--keep", type=pathlib.Path, help="folder for the compiler's dumps")
  return parser


def summary(best: Measurement, reference: Measurement | None) -> dict:
  """What the last line says.

  Args:
    best: Of our kernel.
    reference: Of what it is compared with.
  """
  ratio = None if reference is None else best.bundles / reference.bundles
  return {
    "kernel": best.job.maker,
    "target": best.job.target,
    "direction": best.job.direction,
    "bundles_per_kilo_element": round(best.bundles, 3),
    "ratio_to_reference": None if ratio is None else round(ratio, 3),
    "spills": best.spills,
    "predicted_tflops": round(best.tflops, 1),
    "roofline_share": round(best.roofline_share, 3),
  }


def line(blocks: tuple[int, ...], found: Measurement | str) -> str:
  """A line of the table: what blocks cost, or why they do not compile."""
  label = f"{','.join(map(str, blocks)):<20}"
  if isinstance(found, str):
    return f"{label} {found}"
  slot, full = found.limiting()
  vmem = "" if found.vmem is None else f", VMEM {found.vmem / 2**20:.1f} MiB"
  return (
    f"{label} {found.bundles:6.3f} bundles/1000, {found.tflops:5.0f} TFLOP/s, "
    f"{found.roofline_share:4.0%} of the bound, {found.spills} spills a step, "
    f"fullest {slot} {full:.0%}{vmem}"
  )


def _search(job: Job) -> Measurement | None:
  def tell(blocks, found):
    print(line(blocks, found), flush=True)

  best = search.search(job, tell)
  if best is not None:
    search.write(best)
    print(f"{search.name(job)} = {best.job.blocks}: {tpu_tile_sizes.TABLE}")
  return best


def ours(
  job: Job, blocks: tuple[int, ...] = (), keep: pathlib.Path | None = None
) -> Measurement | None:
  """A kernel of ours, measured and told; None if it does not compile.

  Args:
    job: Its blocks and length are not used.
    blocks: Else those that the kernels take.
    keep: A folder for the compiler's dumps.
  """
  tiles = tpu_tile_sizes.for_device(job.chip.kind, job.head_dim, job.dtype)
  taken = dataclasses.astuple(getattr(tiles, search.name(job)))
  return next(iter(_measure(job, [blocks or taken], keep)), None)


def alike(found: Measurement) -> tuple[int, ...]:
  """A reference's blocks that are most like those of our kernel."""
  q, kv, _, part = found.job.blocks
  return q, kv, part, int(found.job.direction == "backward")


def references(
  found: Measurement, maker: str, keep: pathlib.Path | None = None
) -> list[Measurement]:
  """A reference at blocks like ours and at those of `REFERENCES`."""
  blocks = dict.fromkeys(
    (alike(found), *REFERENCES[maker][found.job.direction])
  )
  job = dataclasses.replace(found.job, maker=maker)
  return _measure(job, blocks, keep)


def _blocks(text: str) -> tuple[int, ...]:
  try:
    blocks = tuple(int(x) for x in text.split(","))
  except ValueError:
    blocks = ()
  if len(blocks) != 4:
    raise SystemExit(
      f"--blocks: found {text!r}, expected four numbers: q,kv,q_part,kv_part"
    )
  return blocks


def _measure(job: Job, blocks, keep) -> list[Measurement]:
  """Prints a line for each of `blocks`; those that compile."""
  found = []
  for n, sizes in enumerate(blocks):
    folder = keep / f"{job.maker}_{n}" if keep else None
    try:
      found.append(report.measure(search.at(job, sizes), folder))
      text = line(sizes, found[-1])
    except ValueError as problem:
      text = line(sizes, str(problem))
    print(f"{job.maker:>15} {text}", flush=True)
  return found


if __name__ == "__main__":
  sys.exit(main())
