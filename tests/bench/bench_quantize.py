"""How long packing takes: NF4 beside bitsandbytes, ggml's types and GPTQ alone.

  .venv/bin/python -m tests.bench.bench_quantize \\
    --peers=.venv-peers/bin/python [--repeats=3] [ROW ...]

  pack_nf4, pack_nf4dq  4096 x 4096 in float32, blocks of 64, without and with
                        double quantization: `Quantize`'s program and
                        bitsandbytes' `quantize_4bit` on this CPU, one process
                        after the other; the ratio is the median of the rounds'
                        (goal 1)
  pack_Q4_K ...         the numbers of all 210 matrices of SmolLM2-135M and of
                        its embedding into blocks of a type. Its rows of 576 are
                        no whole blocks of 256, so they are taken as rows of
                        1536 (goal 30 s)
  gptq                  `experiments.quantize` of all 210 matrices with 24 x 512
                        tokens: the whole command, from start to files (goal
                        90 s)

Compilation and reading are counted for `gptq` only. Each measurement is a
process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.bench import timing

SIDE, RUNS = 4096, 5
TYPES = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
AGAINST = ("pack_nf4", "pack_nf4dq")
ALONE = (*(f"pack_{name}" for name in TYPES), "gptq")
ROWS = (*AGAINST, *ALONE)
LIMIT_S, LIMIT_GPTQ_S = 30.0, 90.0
MATRICES = 210


def matrix():
  """Returns the numbers that both sides pack."""
  import numpy as np

  rng = np.random.default_rng(0)
  return rng.standard_normal((SIDE, SIDE), np.float32)


def timed(work) -> float:
  """Returns seconds of a call, the median of some after the first."""
  work()
  return timing.median_seconds(work, RUNS)


def ours(row: str) -> float:
  """Returns seconds that we take for the matrix."""
  import jax
  import jax.numpy as jnp

  from research.quant.formats.codebook import Codebook
  from research.quant.quantize import Quantize

  how = Quantize(format=Codebook(nested=256 if row == "pack_nf4dq" else 0))
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
      w, blocksize=64, compress_statistics=row == "pack_nf4dq", quant_type="nf4"
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
  format = ggml.TYPES[row.removeprefix("pack_")]
  start = time.perf_counter()
  for w in found:
    qtensor.pack(w, format)
  return time.perf_counter() - start


def calibrated(row: str) -> float:
  """Returns seconds of the command that GPTQ makes SmolLM2's file with."""
  del row
  with tempfile.TemporaryDirectory() as folder:
    command = ["-m", "experiments.quantize", f"--to={folder}/model"]
    command.append("--config=runs/quant/gptq_smollm2.gin")
    # A cache of its own, so that compilation is counted.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
    start = time.perf_counter()
    done = subprocess.run(
      [sys.executable, *command], env=environment, stdout=subprocess.PIPE
    )
    seconds = time.perf_counter() - start
  if done.returncode:
    raise SystemExit(f"experiments.quantize: exit {done.returncode}")
  made = json.loads(done.stdout.splitlines()[-1])["matrices"]
  if made != MATRICES:
    raise SystemExit(f"{made} matrices, expected {MATRICES}")
  return seconds


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
  side = "calibrated" if row == "gptq" else "encoded"
  found = [once(sys.executable, row, side) for _ in range(repeats)]
  print(f"  {row}: {found}", file=sys.stderr, flush=True)
  goal = LIMIT_GPTQ_S if row == "gptq" else LIMIT_S
  return dict(row=row, seconds=statistics.median(found), goal=goal)


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns what each row's processes measured.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  return [
    against(row, peers, repeats) if row in AGAINST else alone(row, repeats)
    for row in names
  ]


def show(found: list[dict]) -> str:
  """Returns the table as Markdown; goals are ratios, or seconds alone."""
  lines = [
    "| row | s | bitsandbytes s | ratio | goal |",
    "| --- | --- | --- | --- | --- |",
  ]
  for r in found:
    more = "- | -"
    if "ratio" in r:
      more = f"{r['bitsandbytes']:.3f} | {r['ratio']:.2f}"
    lines.append(
      f"| {r['row']} | {r['seconds']:.3f} | {more} | {r['goal']:g} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  if unknown := set(args.rows) - set(ROWS):
    parser.error(f"no such rows: {unknown}; there are {', '.join(ROWS)}")
  table = rows(args.rows or list(ROWS), args.peers, args.repeats)
  print(show(table))
  print(json.dumps({"rows": table}))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--here"]:
    sides = dict(
      ours=ours, theirs=theirs, encoded=encoded, calibrated=calibrated
    )
    print(sides[sys.argv[2]](sys.argv[3]))
  else:
    main()
