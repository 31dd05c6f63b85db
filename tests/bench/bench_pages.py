"""What keys and values in pages cost, over a slab for each row.

  python -m tests.bench.bench_pages [ROW ...] [--rounds 3]

Rows, each a process of its own that prints a JSON line: `short`, four prompts
of 4 tokens, and `ragged`, four of 6, 20, 60 and 400. SmolLM2 in float32,
greedy, 80 new tokens each after the first, pages of 16. Both sides are measured
in turn; ratios are medians of the rounds'. No torch, no network.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time

ROWS = {"short": (4, 4, 4, 4), "ragged": (6, 20, 60, 400)}
NEW = 81


def here(row: str, rounds: int) -> dict:
  """Returns what a row measures, in this process."""
  from research.generation import generate, generate_paged
  from research.generation.paging import Paging
  from research.interop.load import load_model

  loaded = load_model("smollm2-135m", "float32", None)
  params = generate.prepare(loaded.params, loaded.model)
  prompts = [
    [(7 * i + j) % 1000 + 5 for j in range(n)] for i, n in enumerate(ROWS[row])
  ]
  sources = {
    "slabs": None,
    "pages": functools.partial(generate_paged.chunks, layout=Paging(16)),
  }

  def run(side, new):
    begin = time.perf_counter()
    found = generate.generate(
      loaded.model, params, prompts, new, source=sources[side]
    )
    return time.perf_counter() - begin, found.tokens

  for side in sources:
    for new in (1, NEW):
      run(side, new)
  first, rate, tokens = {}, {}, {}
  for _ in range(rounds):
    for side in sources:
      one, _ = run(side, 1)
      all_, tokens[side] = run(side, NEW)
      first.setdefault(side, []).append(one)
      rate.setdefault(side, []).append(len(prompts) * (NEW - 1) / (all_ - one))
  return {
    "row": row,
    "same_tokens": tokens["slabs"] == tokens["pages"],
    "decode": {
      side: round(statistics.median(x), 1) for side, x in rate.items()
    },
    "decode_ratio": _ratio(rate["pages"], rate["slabs"]),
    "first_ms": {
      side: round(1e3 * statistics.median(x)) for side, x in first.items()
    },
    "first_ratio": _ratio(first["slabs"], first["pages"]),
  }


def _ratio(ours, theirs) -> float:
  pairs = zip(ours, theirs, strict=True)
  return round(statistics.median(a / b for a, b in pairs), 2)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("rows", nargs="*", default=list(ROWS))
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--here", action="store_true", help="in this process")
  arguments = parser.parse_args()
  for row in arguments.rows:
    if arguments.here:
      print(json.dumps(here(row, arguments.rounds)))
      continue
    subprocess.run(
      [sys.executable, "-m", "tests.bench.bench_pages", row, "--here"]
      + ["--rounds", str(arguments.rounds)],
      check=True,
    )


if __name__ == "__main__":
  main()
