"""Times decoding from weights where XLA put them, and from huge pages.

  .venv/bin/python -m tests.bench.bench_huge_pages [--repeats=5]
    [--sides=packed,bf16,fp32] [--batches=1,8]

First how fast one core reads memory, by NumPy, 160 MB at a time. Then prompt 32
and 64 greedy tokens of SmolLM2-135M, prefill within, in one process, in turn; a
ratio is the median of the repeats'. Sides as in `bench_decode4bit`.
"""

import argparse
import json
import statistics
import sys
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import cpu_memory

PROMPT, NEW = 32, 64


def reading(repeats: int) -> dict:
  """Returns GB/s of both, the best of some."""
  plain = jnp.ones(40 << 20, jnp.uint32).reshape(2, -1)
  both = dict(plain=plain, huge=cpu_memory.in_huge_pages(plain))
  best = dict.fromkeys(both, 0.0)
  for name in [*both] * repeats:
    x = np.asarray(both[name]).view(np.uint64)
    begin = time.perf_counter()
    np.bitwise_or.reduce(x, axis=None)
    spent = time.perf_counter() - begin
    best[name] = max(best[name], x.nbytes / spent / 1e9)
  return best


def load(side: str):
  """Returns (model, prompts' ids, weights as they were, in huge pages)."""
  sys.path.insert(0, "tests/bench")
  import bench_ours

  from research.generation import generate
  from research.quant.layouts import cpu_layout

  loaded, ids = bench_ours.load(side)
  fast = cpu_layout.for_decoding(loaded.params, loaded.model.dtype)
  with mock.patch.object(cpu_memory, "in_huge_pages", lambda params: params):
    plain = generate.prepare(fast, loaded.model)
  huge = cpu_memory.in_huge_pages(plain)
  if huge is plain:
    raise SystemExit("this system has no huge pages, or no memory for them")
  return loaded.model, ids, plain, huge


def measure(loaded, batch: int, repeats: int) -> dict:
  """Returns tokens/s of both, and the ratio."""
  from research.generation import generate

  model, ids, *both = loaded
  prompts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(batch)]

  def once(params) -> float:
    begin = time.perf_counter()
    generate.generate(model, params, prompts, NEW)
    return batch * NEW / (time.perf_counter() - begin)

  for params in both:
    once(params)
  found = [[once(params) for params in both] for _ in range(repeats)]
  ratios = [huge / plain for plain, huge in found]
  plain, huge = (statistics.median(x) for x in zip(*found, strict=True))
  return dict(plain=plain, huge=huge, ratio=statistics.median(ratios),
              ratios=ratios)  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--sides", default="packed,bf16,fp32")
  parser.add_argument("--batches", default="1,8")
  args = parser.parse_args()
  rows, read = [], reading(args.repeats)
  print(f"a core reads {read['plain']:.1f} GB/s, {read['huge']:.1f} from huge "
        "pages\n")  # fmt: skip
  print("| weights | batch | tokens/s | in huge pages | ratio (min..max) |")
  print("| --- | --- | --- | --- | --- |")
  for side in args.sides.split(","):
    loaded = load(side)
    for batch in map(int, args.batches.split(",")):
      row = measure(loaded, batch, args.repeats)
      rows.append(dict(side=side, batch=batch) | row)
      low, high = min(row["ratios"]), max(row["ratios"])
      print(
        f"| {side} | {batch} | {row['plain']:.0f} | {row['huge']:.0f} "
        f"| {row['ratio']:.2f} ({low:.2f}..{high:.2f}) |",
        flush=True,
      )
  print(json.dumps({"gigabytes_per_s": read, "rows": rows}))


if __name__ == "__main__":
  main()
