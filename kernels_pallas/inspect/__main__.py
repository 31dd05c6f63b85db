"""The command: one kernel on one chip, beside the reference if asked."""

import argparse
import dataclasses
import json
import pathlib
import sys

from kernels_pallas.flash_attention import tiling
from kernels_pallas.inspect import build, chips, picture, report
from kernels_pallas.inspect.build import Job
from kernels_pallas.inspect.report import Measurement

# (q, kv, kv part, fused) of splash.
SPLASH = {
  "forward": ((2048, 2048, 256, 0), (2048, 2048, 512, 0), (1024, 1024, 256, 0)),
  "backward": (
    (1024, 1024, 512, 1), (1024, 1024, 1024, 1), (1024, 1024, 1024, 0),
  ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
  """Prints a table, then one line of JSON; returns the exit code."""
  args = _parser().parse_args(arguments)
  problem = build.missing()
  if problem is not None:
    print(f"kernels_pallas.inspect: {problem}", file=sys.stderr)
    return 1
  tiles = [_blocks(args.blocks) if args.blocks else _tile(args)]
  ours = _measure(args, "ours", tiles)
  if not ours:
    return 1
  best = min(ours, key=lambda m: m.bundles)
  theirs = []
  if args.compare == "splash":
    blocks = dict.fromkeys((_same(best), *SPLASH[args.direction]))
    theirs = _measure(args, "splash", blocks)
  reference = min(theirs, key=lambda m: m.bundles, default=None)
  if args.picture:
    chosen = [best] if reference is None else [best, reference]
    picture.draw([s for m in chosen for s in m.schedules], args.picture)
    print(f"picture: {args.picture}")
  print(json.dumps(_summary(args, best, reference)))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.inspect", description=main.__doc__
  )
  add = parser.add_argument
  add("--kernel", choices=["flash_attention"], default="flash_attention")
  add("--target", choices=list(chips.CHIPS), required=True)
  add("--direction", choices=["forward", "backward"], default="forward")
  add("--compare", choices=["splash"], help="read the reference, too")
  add("--head_dim", type=int, default=128)
  add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
  add("--blocks", help="our tile: q,kv,q_part,kv_part")
  add("--backward", choices=["fused", "split"], default="fused")
  add("--picture", type=pathlib.Path, help="PNG of the schedule")
  add("--keep", type=pathlib.Path, help="folder for the compiler's dumps")
  return parser


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


def _tile(args) -> tuple[int, ...]:
  """The tile that the kernels take on the target."""
  tiles = tiling.for_device(chips.CHIPS[args.target].kind)
  names = {("backward", "split"): "dq", ("backward", "fused"): "dkv"}
  name = names.get((args.direction, args.backward), "forward")
  return dataclasses.astuple(getattr(tiles, name))


def _same(ours: Measurement) -> tuple[int, ...]:
  """Splash's blocks that are most like ours."""
  q, kv, _, part = ours.job.blocks
  return q, kv, part, int(ours.job.direction == "backward")


def _measure(args, maker: str, blocks) -> list[Measurement]:
  """Prints a line for each of `blocks`; those that compile."""
  found = []
  for n, sizes in enumerate(blocks):
    job = Job(
      maker=maker,
      target=args.target,
      direction=args.direction,
      length=4 * max(sizes[:2]),
      head_dim=args.head_dim,
      dtype=args.dtype,
      blocks=tuple(sizes),
      backward=args.backward,
    )
    keep = args.keep / f"{maker}_{n}" if args.keep else None
    name = f"{maker:>7} {','.join(map(str, sizes)):<20}"
    try:
      one = report.measure(job, keep)
    except ValueError as problem:
      print(f"{name} {problem}", flush=True)
      continue
    slot, full = one.limiting()
    print(
      f"{name} {one.bundles:6.3f} bundles/1000, {one.tflops:5.0f} TFLOP/s, "
      f"{one.roofline_share:4.0%} of the bound, {one.spills} spills a step, "
      f"fullest {slot} {full:.0%}",
      flush=True,
    )
    found.append(one)
  return found


def _summary(args, best: Measurement, reference: Measurement | None) -> dict:
  ratio = None if reference is None else best.bundles / reference.bundles
  return {
    "kernel": args.kernel,
    "target": args.target,
    "direction": args.direction,
    "bundles_per_kilo_element": round(best.bundles, 3),
    "ratio_to_reference": None if ratio is None else round(ratio, 3),
    "spills": best.spills,
    "predicted_tflops": round(best.tflops, 1),
    "roofline_share": round(best.roofline_share, 3),
  }


if __name__ == "__main__":
  sys.exit(main())
