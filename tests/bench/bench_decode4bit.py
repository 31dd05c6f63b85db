"""Decoding from panels against our own fp32 and against transformers in bf16.

  .venv/bin/python -m tests.bench.bench_decode4bit \\
    --peers=.venv-peers/bin/python [--repeats=3] [--batches=1,8]
    [--sides=packed,int4,nvfp4,bf16] [--prefill]

Every round measures each side once, one process after the other, so that a
machine which changes speed changes it for all; a ratio is the median of the
rounds' ratios. Prompt 32 and 64 greedy tokens of SmolLM2-135M, prefill within.
`packed` is the file's own Q4_1 layers and Q8_0 embedding; the others the same
weights, the embedding too, in `bench_ours.formats` and in bfloat16; all in
panels (`kernels_pallas.quantized_matmul`).
"""

import argparse
import json
import os
import statistics
import sys

ROWS = ("decode4bit_b1", "decode4bit_b8", "prefill4bit_b1")
"""Of `make bench`, all sides each; the goal of prefill is fp32's speed."""

AGAINST = {
  "packed": ("fp32", 4.0),
  **{
    name: ("fp32", 4.0)
    for name in ("nf4", "nf4dq", "int4", "int4order", "q40", "iq4nl")
  },
  "mxfp4": ("fp32", 4.0),
  "nvfp4": ("fp32", 4.0),
  "int8": ("fp32", None),
  "bf16": ("bf16 of transformers", 2.5),
}
"""Each side's other one, and how many times its speed is the goal."""


def rounds(
  what: str, batch: int, peers: str, repeats: int, chosen: list[str]
) -> dict[str, list[float]]:
  """Returns tokens/s of every side, and its other one, in each round."""
  from tests.bench import bench  # which imports this module

  theirs = [peers, "-W", "ignore", "tests/bench/bench_torch.py", "--here"]
  sides = {name: (bench.OURS, name) for name in ("fp32", *AGAINST)}
  sides["bf16 of transformers"] = theirs, "bf16"
  used = {*chosen, *(AGAINST[name][0] for name in chosen)}
  sides = {name: side for name, side in sides.items() if name in used}
  found = {name: [] for name in sides}
  for _ in range(repeats):
    for name, (command, dtype) in sides.items():
      row = f"{what}_b{batch}_{dtype}"
      made = bench.once(command, row, dict(os.environ))
      found[name].append(made["tokens_per_s"])
    print(f"  batch {batch}: {found}", file=sys.stderr, flush=True)
  return found


def compared(
  what: str, batch: int, peers: str, repeats: int, chosen: list[str]
) -> list[dict]:
  """Returns what sides reach: medians, and ratios of the rounds.

  Args:
    what: `"decode"` or `"prefill"`.
    batch: sequences at a time.
    peers: their Python.
    repeats: rounds.
    chosen: sides, of `AGAINST`.
  """
  found, out = rounds(what, batch, peers, repeats, chosen), []
  for side in chosen:
    other, goal = AGAINST[side]
    pairs = zip(found[side], found[other], strict=True)
    ratios = [a / b for a, b in pairs]
    line = dict(row=f"{what}4bit_b{batch}", batch=batch, side=side)
    out.append(
      line
      | dict(
        tokens_per_s=statistics.median(found[side]),
        ratio=statistics.median(ratios),
        ratios=ratios,
        to=other,
        goal=1.0 if what == "prefill" else goal,
      )
    )
  return out


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns all sides of each row.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  out = []
  for name in names:
    what, batch = name.split("4bit_b")
    out += compared(what, int(batch), peers, repeats, list(AGAINST))
  return out


def show(found: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| row | side | tokens/s | ratio (min..max) | to | goal |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for r in found:
    low, high = min(r["ratios"]), max(r["ratios"])
    lines.append(
      f"| {r['row']} | {r['side']} | {r['tokens_per_s']:.0f} "
      f"| {r['ratio']:.2f} ({low:.2f}..{high:.2f}) | {r['to']} "
      f"| {r['goal'] or '-'} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--batches", default="1,8")
  parser.add_argument("--sides", default=",".join(AGAINST))
  parser.add_argument("--prefill", action="store_true")
  args = parser.parse_args()
  chosen = args.sides.split(",")
  if unknown := set(chosen) - set(AGAINST):
    parser.error(f"no such sides: {unknown}; there are {', '.join(AGAINST)}")
  what = "prefill" if args.prefill else "decode"
  table = []
  for batch in map(int, args.batches.split(",")):
    table += compared(what, batch, args.peers, args.repeats, chosen)
  print(show(table))
  print(json.dumps({"rows": table}))


if __name__ == "__main__":
  main()
