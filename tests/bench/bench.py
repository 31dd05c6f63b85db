"""The speed tables: ours against torch, side by side in one run, and the rest.

  make bench                     # every row, 2 to 3 hours on two idle cores
  make bench ARGS='train_fp32 decode_b1_fp32 --repeats=3'
  make bench ARGS='checkpoint pipeline host import_gguf_fp32'
  make bench ARGS='decode4bit_b1 pack_nf4 gptq'
  make bench ARGS=start          # rows that begin with start_

Rows against torch come first; those of `bench_methods` (PEFT's methods),
`bench_attention` (attention alone), `bench_diffusion` (masked diffusion),
`bench_decode4bit` (few bits' panels), `bench_llama_cpp` (GGUF files),
`bench_quantize` (packing, GPTQ), `bench_images` (preprocessing of images),
`bench_vlm` (a vision language model), `bench_search` (a search by a reward
model), `bench_start` (how soon commands answer), `bench_loop` (checkpoints,
input, the host) and `bench_import` (loading models, memory) follow. Each
measurement is a process of its own; ours and torch's alternate, so that a
machine which changes speed changes it for both.
The ratio is the median of the pairs' ratios.
`--huge_pages=ours` starts training steps as each side does by itself: ours ask
glibc for huge pages; `both` gives them to torch, too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import tests.bench.bench_torch as table
from tests.bench import (
  bench_attention,
  bench_decode4bit,
  bench_diffusion,
  bench_images,
  bench_import,
  bench_llama_cpp,
  bench_loop,
  bench_methods,
  bench_quantize,
  bench_search,
  bench_start,
  bench_vlm,
  sides,
)

OURS = [sys.executable, "tests/bench/bench_ours.py"]
LIMITS = {
  "train": "FLOPs of the matmuls",
  "decode": "bytes of the weights",
  "perplexity": "FLOPs of the matmuls",
}
SECTIONS = {
  "methods": bench_methods,
  "attention": bench_attention,
  "diffusion": bench_diffusion,
  "decoding": bench_decode4bit,
  "llama_cpp": bench_llama_cpp,
  "packing": bench_quantize,
  "images": bench_images,
  "vlm": bench_vlm,
  "search": bench_search,
  "start": bench_start,
}
"""Tables of their own, by name in the JSON line."""


def once(command: list[str], row: str, environment: dict) -> dict:
  """Returns what one process measured."""
  done = subprocess.run(
    [*command, row], env=environment, stdout=subprocess.PIPE, text=True
  )
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} {row}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def compare(row: str, peers: str, repeats: int, huge_pages: str) -> dict:
  """Returns the medians and ratios of one row."""
  theirs = [peers, "-W", "ignore", "tests/bench/bench_torch.py", "--here"]
  pairs = []
  for i in range(repeats):
    pair = [
      once(OURS, row, sides.environment("ours", huge_pages)),
      once(theirs, row, sides.environment("torch", huge_pages)),
    ]
    pairs.append(pair)
    rates = [side["tokens_per_s"] for side in pair]
    print(f"  {row} {i + 1}/{repeats}: {rates}", file=sys.stderr, flush=True)
  ours = statistics.median(a["tokens_per_s"] for a, _ in pairs)
  peer = statistics.median(b["tokens_per_s"] for _, b in pairs)
  ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
  memory = [statistics.median(s[i]["peak_rss_bytes"] for s in pairs) for i in (0, 1)]  # fmt: skip # noqa: E501
  return {
    "row": row,
    "ours": ours,
    "torch": peer,
    "ratio": statistics.median(ratios),
    "spread": (min(ratios), max(ratios)),
    "memory": memory[0] / memory[1],
    "ours_gb": memory[0] / 2**30,
    "torch_gb": memory[1] / 2**30,
    "compile_s": pairs[0][0].get("compile_s"),
    "limit": LIMITS[row.split("_")[0]],
  }


def show(rows: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| row | ours tok/s | torch tok/s | ratio (min..max) | ours GiB "
    "| torch GiB | memory | compile s | limit |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in rows:
    low, high = r["spread"]
    lines.append(
      f"| {r['row']} | {r['ours']:.0f} | {r['torch']:.0f} "
      f"| {r['ratio']:.2f} ({low:.2f}..{high:.2f}) | {r['ours_gb']:.2f} "
      f"| {r['torch_gb']:.2f} | {r['memory']:.0%} | {r['compile_s']} "
      f"| {r['limit']} |"
    )
  return "\n".join(lines)


def section(name: str, names: list[str], args: argparse.Namespace) -> list:
  """Prints a table of `SECTIONS` if rows of it are wanted; returns its rows."""
  module = SECTIONS[name]
  chosen = [row for row in names if row in module.ROWS]
  if not chosen:
    return []
  more = (args.huge_pages,) if name == "methods" else ()
  found = module.rows(chosen, args.peers, args.repeats, *more)
  print(module.show(found))
  return found


def matching(wanted: list[str], known: list[str]) -> list[str]:
  """Returns the rows of these names, or that begin with them and `_`.

  Args:
    wanted: names and beginnings; none for all rows.
    known: all rows.

  Raises:
    ValueError: no row matches one of them.
  """
  names = []
  for name in wanted:
    begin = [row for row in known if row.startswith(f"{name}_")]
    matches = [name] if name in known else begin
    if not matches:
      raise ValueError(f"no such row: {name}; there are {', '.join(known)}")
    names += matches
  return list(dict.fromkeys(names)) or known


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--huge_pages", choices=sides.HUGE_PAGES, default="none")
  args = parser.parse_args()
  modules = (table, *SECTIONS.values(), bench_loop, bench_import)
  known = [row for module in modules for row in module.ROWS]
  try:
    names = matching(args.rows, known)
  except ValueError as error:
    parser.error(str(error))
  rows = [
    compare(row, args.peers, args.repeats, args.huge_pages)
    for row in names
    if row in table.ROWS
  ]
  print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
        f"{platform.machine()}, huge pages: {args.huge_pages}")  # fmt: skip
  if rows:
    print(show(rows))
  found = {"rows": rows}
  found |= {name: section(name, names, args) for name in SECTIONS}
  found["loop"] = [bench_loop.once(r) for r in names if r in bench_loop.ROWS]
  print("\n".join(map(json.dumps, found["loop"])))
  found["import"] = bench_import.rows(
    [row for row in names if row in bench_import.ROWS]
  )
  if found["import"]:
    print(bench_import.show(found["import"]))
  print(json.dumps(found))


if __name__ == "__main__":
  main()
