"""Attention on this CPU: ours, naive XLA attention, torch's own.

  make bench ARGS='attention_forward_causal_fp32 --repeats=3'
  .venv/bin/python tests/bench/bench_attention.py ours ROW [LENGTH ...]
  .venv-peers/bin/python tests/bench/bench_attention.py torch ROW [LENGTH ...]

A row is a direction (`forward`, or `train`: forward and backward), a mask and
a dtype; its lines are lengths, for one sequence of 4 heads of 64. `naive` is
`jax.nn.dot_product_attention`, which holds the scores, and stops at 8,192
tokens: beyond, they alone are 4 GiB. torch's is `scaled_dot_product_attention`
by its flash kernel for CPUs. Each side runs in a process of its own, one after
another, and prints one JSON line, milliseconds by length: the least of its
calls, since what disturbs a call only ever makes it longer.
"""

import itertools
import json
import os
import statistics
import sys
import time

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
NAIVE_MOST = 8192
HEADS, HEAD_DIM = 4, 64
THREADS = 2
SECONDS = 1.5
"""To spend at least on a length, after the first call."""

ROWS = tuple(
  "_".join(("attention", *parts))
  for parts in itertools.product(
    ("forward", "train"), ("causal", "full"), ("fp32", "bf16")
  )
)


def ours(train: bool, causal: bool, dtype: str, length: int):
  """A call of `flash_attention`, as `auto` has it, compiled."""
  from kernels_pallas.flash_attention.api import flash_attention

  def attend(q, k, v):
    return flash_attention(q, k, v, causal=causal)

  return _compiled(attend, train, dtype, length)


def naive(train: bool, causal: bool, dtype: str, length: int):
  """A call of attention with all its scores, compiled."""
  import jax

  def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

  return _compiled(attend, train, dtype, length)


def _compiled(attend, train: bool, dtype: str, length: int):
  import jax
  import jax.numpy as jnp

  dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (1, length, HEADS, HEAD_DIM)
  *x, do = (jax.random.normal(key, shape, dtype) for key in keys)

  def step(q, k, v, do):
    if not train:
      return attend(q, k, v)
    o, back = jax.vjp(attend, q, k, v)
    return o, back(do)

  run = jax.jit(step).lower(*x, do).compile()
  return lambda: jax.block_until_ready(run(*x, do))


def torch(train: bool, causal: bool, dtype: str, length: int):
  """A call of torch's flash attention, heads before tokens as it wants them."""
  import torch
  from torch.nn import attention, functional

  torch.set_num_threads(THREADS)
  torch.manual_seed(0)
  dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
  shape = (1, HEADS, length, HEAD_DIM)
  *x, do = (torch.randn(shape, dtype=dtype) for _ in range(4))
  for one in x:
    one.requires_grad_(train)

  def run():
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
      o = functional.scaled_dot_product_attention(*x, is_causal=causal)
    if train:
      torch.autograd.grad(o, x, do)

  return run


SIDES = {"ours": ours, "naive": naive, "torch": torch}


def measure(side: str, row: str, lengths: tuple[int, ...]) -> dict:
  """Returns milliseconds by length, in this process."""
  _, direction, mask, dtype = row.split("_")
  found = {}
  for length in lengths:
    if side == "naive" and length > NAIVE_MOST:
      continue
    run = SIDES[side](direction == "train", mask == "causal", dtype, length)
    run()
    spent = []
    while len(spent) < 3 or sum(spent) < SECONDS:
      begin = time.perf_counter()
      run()
      spent.append(time.perf_counter() - begin)
    found[length] = round(min(spent) * 1e3, 3)
  return found


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns a line for each row and length, sides one after another.

  Args:
    names: Of `ROWS`.
    peers: Their Python.
    repeats: Rounds; a ratio is the median of the rounds' ratios.
  """
  from tests.bench import sides  # the script alone does not see it

  found = []
  for row in names:
    rounds = [
      {side: sides.once(__file__, side, row, peers) for side in SIDES}
      for _ in range(repeats)
    ]
    print(f"  {row}: {rounds}", file=sys.stderr, flush=True)
    for length in map(str, LENGTHS):
      line = {"row": row, "length": int(length)}
      for side in SIDES:
        timed = [r for r in rounds if length in r[side]]
        ratios = [r[side][length] / r["ours"][length] for r in timed]
        line[f"{side}_ms"] = _median([r[side][length] for r in timed])
        line[f"{side}_to_ours"] = _median(ratios)
      found.append(line)
  return found


def _median(numbers: list[float]) -> float | None:
  return statistics.median(numbers) if numbers else None


def show(found: list[dict]) -> str:
  """Returns the speed-ups as Markdown, a column a length.

  A cell is naive XLA's time, then torch's, each over ours: above 1 we are the
  faster one.
  """
  lengths = " | ".join(f"{n:,}" for n in LENGTHS)
  lines = [
    f"| naive / ours, torch / ours | {lengths} |",
    "| --- " * (1 + len(LENGTHS)) + "|",
  ]
  for row, group in itertools.groupby(found, key=lambda line: line["row"]):
    cells = [
      f"{_ratio(line['naive_to_ours'])}, {_ratio(line['torch_to_ours'])}"
      for line in group
    ]
    name = row.removeprefix("attention_").replace("_", " ")
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _ratio(x: float | None) -> str:
  return "-" if x is None else f"{x:.2f}"


if __name__ == "__main__":
  sys.path.insert(0, os.getcwd())
  side, row, *lengths = sys.argv[1:]
  print(json.dumps(measure(side, row, tuple(map(int, lengths)) or LENGTHS)))
