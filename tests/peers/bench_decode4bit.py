"""Decoding from panels against our own fp32 and against transformers in bf16.

  .venv/bin/python -m tests.peers.bench_decode4bit \\
    --peers=.venv-peers/bin/python [--repeats=3] [--batches=1,8]

Every round measures each side once, one process after the other, so that a
machine which changes speed changes it for all; a ratio is the median of the
rounds' ratios. Prompt 32 and 64 greedy tokens of SmolLM2-135M, prefill within.
`packed` is the file's own Q4_1 layers and Q8_0 embedding; `bf16` the same
weights in bfloat16; both in panels (`kernels_pallas.quantized_matmul`).
"""

import argparse
import json
import os
import statistics
import sys

from tests.peers import bench

RATIOS = (("packed", "fp32"), ("bf16", "bf16 of transformers"))
GOALS = (4.0, 2.5)


def rounds(batch: int, peers: str, repeats: int) -> dict[str, list[float]]:
  """Returns tokens/s of every side in each round."""
  theirs = [peers, "-W", "ignore", "tests/peers/bench_torch.py", "--here"]
  sides = {
    "fp32": (bench.OURS, "fp32"),
    "packed": (bench.OURS, "packed"),
    "bf16": (bench.OURS, "bf16"),
    "bf16 of transformers": (theirs, "bf16"),
  }
  found = {name: [] for name in sides}
  for _ in range(repeats):
    for name, (command, dtype) in sides.items():
      row = f"decode_b{batch}_{dtype}"
      made = bench.once(command, row, dict(os.environ))
      found[name].append(made["tokens_per_s"])
    print(f"  batch {batch}: {found}", file=sys.stderr, flush=True)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--batches", default="1,8")
  args = parser.parse_args()
  print("| batch | side | tokens/s | ratio (min..max) | to | goal |")
  print("| --- | --- | --- | --- | --- | --- |")
  table = []
  for batch in map(int, args.batches.split(",")):
    found = rounds(batch, args.peers, args.repeats)
    for (side, other), goal in zip(RATIOS, GOALS, strict=True):
      pairs = zip(found[side], found[other], strict=True)
      ratios = [a / b for a, b in pairs]
      ratio, rate = statistics.median(ratios), statistics.median(found[side])
      print(
        f"| {batch} | {side} | {rate:.0f} | {ratio:.2f} "
        f"({min(ratios):.2f}..{max(ratios):.2f}) | {other} | {goal} |"
      )
      table.append(dict(batch=batch, side=side, tokens_per_s=rate, ratio=ratio))
  print(json.dumps({"rows": table}))


if __name__ == "__main__":
  main()
