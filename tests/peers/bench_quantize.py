"""How long packing takes: NF4 beside bitsandbytes, ggml's types alone.

  .venv/bin/python -m tests.peers.bench_quantize \\
    --peers=.venv-peers/bin/python [--repeats=3] [ROW ...]

  nf4, nf4dq     4096 x 4096 in float32, blocks of 64, with and without double
                 quantization: `Quantize`'s program and bitsandbytes'
                 `quantize_4bit` on this CPU, one process after the other; the
                 ratio is the median of the rounds' (goal 1)
  Q4_K, Q6_K ... the numbers of all 210 matrices of SmolLM2-135M and of its
                 embedding into blocks of a type. Its rows of 576 are no whole
                 blocks of 256, so they are taken as rows of 1536 (goal 30 s)

Compilation and reading are not counted. Each measurement is a process of its
own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

SIDE, RUNS = 4096, 5
AGAINST = ("nf4", "nf4dq")
ALONE = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
ROWS = (*AGAINST, *ALONE)
LIMIT_S = 30.0


def matrix():
  """Returns the numbers that both sides pack."""
  import numpy as np

  rng = np.random.default_rng(0)
  return rng.standard_normal((SIDE, SIDE), np.float32)


def timed(work) -> float:
  """Returns seconds of a call, the median of some after the first."""
  work()
  found = []
  for _ in range(RUNS):
    start = time.perf_counter()
    work()
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def ours(row: str) -> float:
  """Returns seconds that we take for the matrix."""
  import jax
  import jax.numpy as jnp

  from research.quant.formats.codebook import Codebook
  from research.quant.quantize import Quantize

  how = Quantize(format=Codebook(nested=256 if row == "nf4dq" else 0))
  w = jnp.asarray(matrix())
  return timed(lambda: jax.block_until_ready(how.pack(w)))


def theirs(row: str) -> float:
  """Returns seconds that bitsandbytes takes for the matrix."""
  import bitsandbytes.functional as bnb
  import torch

  torch.set_num_threads(2)
  w = torch.from_numpy(matrix())
  return timed(
    lambda: bnb.quantize_4bit(
      w, blocksize=64, compress_statistics=row == "nf4dq", quant_type="nf4"
    )
  )


def encoded(row: str) -> float:
  """Returns seconds in which all of SmolLM2 becomes a type of ggml's."""
  import numpy as np

  from research.interop import load
  from research.quant import qtensor
  from research.quant.formats import ggml

  params = load.load_model("smollm2-135m").params
  layers = params["run0"]["layer0"]
  found = [*layers["attention"].values(), *layers["mlp"].values()]
  found = [np.swapaxes(w, -1, -2) for w in found] + [params["embed"]]
  found = [np.asarray(w).reshape(-1, 1536).T for w in found]
  format = ggml.TYPES[row]
  start = time.perf_counter()
  for w in found:
    qtensor.pack(w, format)
  return time.perf_counter() - start


def once(python: str, row: str, side: str) -> float:
  """Returns seconds that a process of its own measured."""
  module = ["-W", "ignore", "-m", __spec__.name, "--here", side, row]
  done = subprocess.run([python, *module], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f"{row}, {side}: exit {done.returncode}")
  return float(done.stdout.strip().splitlines()[-1])


def against(row: str, peers: str, repeats: int) -> dict:
  """Returns medians of both sides, and of their rounds' ratios."""
  pairs = []
  for _ in range(repeats):
    mine = once(sys.executable, row, "ours")
    pairs.append((mine, once(peers, row, "theirs")))
    print(f"  {row}: {pairs[-1]}", file=sys.stderr, flush=True)
  ratios = [b / a for a, b in pairs]
  return dict(
    row=row,
    seconds=statistics.median(a for a, _ in pairs),
    bitsandbytes=statistics.median(b for _, b in pairs),
    ratio=statistics.median(ratios),
    goal=1.0,
  )


def alone(row: str, repeats: int) -> dict:
  """Returns the median of our seconds."""
  found = [once(sys.executable, row, "encoded") for _ in range(repeats)]
  print(f"  {row}: {found}", file=sys.stderr, flush=True)
  return dict(row=row, seconds=statistics.median(found), goal=LIMIT_S)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  if unknown := set(args.rows) - set(ROWS):
    parser.error(f"no such rows: {unknown}; there are {', '.join(ROWS)}")
  table = []
  print("| row | s | bitsandbytes s | ratio | goal |")
  print("| --- | --- | --- | --- | --- |")
  for row in args.rows or ROWS:
    if row in AGAINST:
      found = against(row, args.peers, args.repeats)
      more = f"{found['bitsandbytes']:.3f} | {found['ratio']:.2f}"
    else:
      found, more = alone(row, args.repeats), "- | -"
    table.append(found)
    print(f"| {row} | {found['seconds']:.3f} | {more} | {found['goal']:g} |")
  print(json.dumps({"rows": table}))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--here"]:
    sides = {"ours": ours, "theirs": theirs, "encoded": encoded}
    print(sides[sys.argv[2]](sys.argv[3]))
  else:
    main()
