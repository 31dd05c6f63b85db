"""Times the attention of one token a row on this machine's CPU.

  .venv/bin/python -m tests.bench.bench_decode_step [--repeats=5]

By the C++ kernel that generation takes (`decode_attention`, backend cpu), by
`flash_attention` with one query, which it took before and takes where there is
no compiler, and by decoding in plain lax (backend xla). Each repeat runs every
side in turn; a ratio is the median of the repeats'.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention.api import decode_attention
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask

CASES = [
  # rows, query heads, key heads, tokens, slots, head dim
  (1, 9, 3, 80, 96, 64),
  (8, 9, 3, 80, 96, 64),
  (1, 9, 3, 1000, 1024, 64),
  (8, 9, 3, 1000, 1024, 64),
  (1, 32, 8, 8000, 8192, 128),
]
SECONDS = 0.3
"""Of each measurement, about."""


def one_query(q, k, v, lengths):
  """What a layer of generation did without a kernel for the step."""
  slot = jnp.arange(k.shape[1])
  held = jnp.where(slot < lengths[:, None], slot, -1)
  mask = Mask.causal(q_positions=lengths[:, None] - 1, kv_positions=held)
  return flash_attention(q[:, None], k, v, mask=mask)[:, 0]


SIDES = {
  "cpu": functools.partial(decode_attention, backend="cpu"),
  "one query": one_query,
  "xla": functools.partial(decode_attention, backend="xla"),
}


def seconds(run, x) -> float:
  """Of one call, as a loop in one program has it."""
  begin, count = time.perf_counter(), 0
  while time.perf_counter() - begin < SECONDS:
    jax.block_until_ready([run(*x) for _ in range(10)])
    count += 10
  return (time.perf_counter() - begin) / count


def measure(case: tuple[int, ...], dtype: str, repeats: int) -> dict:
  """Returns microseconds of each side, and the ratios to the kernel's."""
  B, N, K, tokens, S, H = case
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape in ((B, N, H), (B, K, S, H), (B, K, S, H))
  )
  x = q, k, v, jnp.full((B,), tokens, jnp.int32)

  def over_cache(attend):
    # Heads before slots, as a cache is kept.
    return lambda q, k, v, n: attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), n)

  runs = {name: jax.jit(over_cache(attend)) for name, attend in SIDES.items()}
  for run in runs.values():
    jax.block_until_ready(run(*x))
  found = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      found[name].append(seconds(run, x) * 1e6)
  ratios = {
    name: statistics.median(
      a / b for a, b in zip(times, found["cpu"], strict=True)
    )
    for name, times in found.items()
  }
  line = dict(rows=B, heads=N, key_heads=K, tokens=tokens, head_dim=H)
  us = {name: statistics.median(times) for name, times in found.items()}
  return line | dict(dtype=dtype, us=us, ratios=ratios)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  rows = []
  print("| rows, heads, tokens, dim | dtype | cpu | one query | xla |")
  print("| --- | --- | --- | --- | --- |")
  for case in CASES:
    for dtype in ("float32", "bfloat16"):
      row = measure(case, dtype, args.repeats)
      rows.append(row)
      what = f"{row['rows']}, {row['heads']} on {row['key_heads']}"
      cells = [
        f"{row['us'][name]:.0f} us" + f" ({row['ratios'][name]:.1f})"
        for name in ("one query", "xla")
      ]
      print(
        f"| {what}, {row['tokens']:,}, {row['head_dim']} | {dtype} "
        f"| {row['us']['cpu']:.0f} us | {' | '.join(cells)} |",
        flush=True,
      )
  print(json.dumps({"rows": rows}))


if __name__ == "__main__":
  main()
