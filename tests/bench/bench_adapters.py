"""What a batch of 32 adapters costs over one adapter for all of its rows.

  python -m tests.bench.bench_adapters [ROW ...] [--rounds 3]

Rows, each a process of its own that prints a JSON line: float32, bfloat16, and
packed (the file's 4-bit blocks, decoded from panels). SmolLM2, rank 8 on every
linear layer, 32 prompts of 64 tokens and 33 new ones. Both sides are measured
in turn; the ratio is the median of the rounds'. No torch, no network.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

ROWS = ("float32", "bfloat16", "packed")
BATCH, PROMPT, NEW, RANK = 32, 64, 33, 8
LIMIT = 0.8


def adapters(params, count: int):
  """Yields trees with drawn adapters."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from research import tree
  from research.lora import adapt
  from research.lora.methods.lora import LoRA

  fresh = adapt.Adapt(method=LoRA(rank=RANK))(params, jax.random.key(0))
  for seed in range(count):
    rng = np.random.default_rng(seed)

    def drawn(path, x, rng=rng):
      if not path.endswith("trained/b"):
        return x
      return jnp.asarray(1e-3 * rng.standard_normal(x.shape, np.float32))

    yield tree.map_paths(drawn, fresh)


def timed(model, params, prompts) -> dict:
  """Returns tokens/s of prefill and of decoding."""
  from research.generation import generate

  begin, ends = time.perf_counter(), []
  for _ in generate.chunks(model, params, prompts, NEW):
    ends.append(time.perf_counter())
  return {
    "prefill": BATCH * PROMPT / (ends[0] - begin),
    "decode": BATCH * (NEW - 1) / (ends[-1] - ends[0]),
  }


def here(row: str, rounds: int) -> dict:
  """Returns what a row measures, in this process."""
  import jax

  from research import weights
  from research.data.sources import PydocTopics
  from research.generation import generate
  from research.interop.load import load_model
  from research.lora.serving import pool
  from research.quant.layouts import cpu_layout

  packed = row == "packed"
  dtype = "float32" if packed else row
  loaded = load_model("smollm2-135m", dtype=dtype, packed=packed)
  model = loaded.model
  ids = loaded.tokenizer.encode(
    "\n".join(PydocTopics("train")[i] for i in range(10))[:12000]
  )
  prompts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(BATCH)]

  def ready(params):
    return generate.prepare(cpu_layout.for_decoding(params, model.dtype), model)

  held = pool.create(loaded.params, model, slots=BATCH, rank=RANK)
  names, first = [f"{k}" for k in range(BATCH + 1)], None
  for name, tree in zip(names, adapters(loaded.params, BATCH + 1), strict=True):
    first = first or tree
    held = pool.add_tree(held, name, tree)
  held, of_rows = pool.use(held, names[1:])
  sides = {
    "one": ready(first),
    "many": weights.bind(ready(held.params), ids=of_rows),
  }
  found: dict[str, list] = {name: [] for name in sides}
  for _ in range(rounds + 1):  # the first compiles
    for name, params in sides.items():
      found[name].append(timed(model, params, prompts))
  out = {"row": row, "batch": BATCH, "rank": RANK, "limit": LIMIT}
  for phase in ("prefill", "decode"):
    one, many = ([t[phase] for t in found[name][1:]] for name in sides)
    ratios = [b / a for a, b in zip(one, many, strict=True)]
    out[phase] = {
      "one": round(statistics.median(one), 1),
      "many": round(statistics.median(many), 1),
      "ratio": round(statistics.median(ratios), 3),
      "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
  swaps = []
  for name in names[:2]:  # the first evicts the second
    begin = time.perf_counter()
    held, _ = pool.use(held, [name])
    jax.block_until_ready(held.params)
    swaps.append(time.perf_counter() - begin)
  return out | {"swap_ms": round(1e3 * min(swaps), 1)}


def once(row: str, *options: str) -> dict:
  """Returns what a row measures, in a process of its own."""
  command = [sys.executable, "-m", "tests.bench.bench_adapters", row, "--here"]
  done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f"{row}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def show(rows: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| weights | phase | one adapter tok/s | 32 adapters tok/s | ratio "
    "(min..max) |",
    "| --- | --- | --- | --- | --- |",
  ]
  for r in rows:
    for phase in ("prefill", "decode"):
      x = r[phase]
      low, high = x["spread"]
      lines.append(
        f"| {r['row']} | {phase} | {x['one']} | {x['many']} "
        f"| {x['ratio']} ({low}..{high}) |"
      )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if unknown := set(args.rows) - set(ROWS):
    parser.error(f"no such rows: {unknown}; there are {', '.join(ROWS)}")
  if args.here:
    print(json.dumps(here(args.rows[0], args.rounds)))
    return
  rows = [once(row, f"--rounds={args.rounds}") for row in args.rows or ROWS]
  print(show(rows))
  print(json.dumps(rows))


if __name__ == "__main__":
  main()
