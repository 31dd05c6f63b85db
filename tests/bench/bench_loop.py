"""What the loop costs around its steps: checkpoints, input, the host.

  python -m tests.bench.bench_loop [ROW ...]

Rows, each a process of its own that prints a JSON line:

  checkpoint  GB/s of saving and restoring SmolLM2's size in fp32 with its
              checksums, against numpy writing and reading the same arrays
  pipeline    tokens/s that the input pipeline delivers, against what a step of
              the main job uses up (--demand)
  host        microseconds that the loop adds to each call of a tiny step

No torch, no network; a temporary folder beside the working directory.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.bench import timing

ROWS = ("checkpoint", "pipeline", "host")
DEMAND = 700.0
"""Tokens/s: a LoRA step of SmolLM2 in bf16 on two cores (`make bench`)."""


def synced(folder: pathlib.Path) -> None:
  """Waits until everything in `folder` is on the disk."""
  for file in folder.rglob("*"):
    if file.is_file():
      with file.open("rb") as f:
        os.fsync(f.fileno())


def checkpoint(folder: pathlib.Path, repeats: int) -> dict:
  """Returns GB/s of both ways, each the best of `repeats`."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from research import tree
  from research.interop import load
  from research.training import state
  from research.training.checkpoints.checkpoint import Checkpoints

  params = load.load_model("smollm2-135m").params
  trained = state.create(params, ".", optax.sgd(1e-3))
  size = tree.nbytes(trained.trainable)
  arrays = [np.asarray(x) for x in jax.tree.leaves(trained.trainable)]
  times = {"save": [], "restore": [], "numpy_save": [], "numpy_restore": []}
  with Checkpoints(folder / "ours", keep=1) as kept:
    for i in range(repeats):
      step = jnp.asarray(i + 1, jnp.int32)
      one = state.TrainState(
        step, trained.trainable, trained.frozen, trained.opt_state
      )

      def save(one=one):
        kept.save(one)
        synced(folder / "ours")

      times["save"].append(timing.seconds(save))
      times["restore"].append(
        timing.seconds(lambda one=one: jax.block_until_ready(kept.restore(one)))
      )

      def write():
        for k, x in enumerate(arrays):
          np.save(folder / f"{k}.npy", x)
        for file in folder.glob("*.npy"):
          with file.open("rb") as f:
            os.fsync(f.fileno())

      times["numpy_save"].append(timing.seconds(write))
      times["numpy_restore"].append(
        timing.seconds(
          lambda: [
            jnp.asarray(np.load(folder / f"{k}.npy"))
            for k in range(len(arrays))
          ]
        )
      )
  rates = {k: size / min(v) / 1e9 for k, v in times.items()}
  return {
    "gigabytes": size / 1e9,
    **{f"{k}_gb_per_s": round(v, 2) for k, v in rates.items()},
    "save_ratio": round(rates["save"] / rates["numpy_save"], 2),
    "restore_ratio": round(rates["restore"] / rates["numpy_restore"], 2),
  }


def pipeline(folder: pathlib.Path, demand: float) -> dict:
  """Returns tokens/s of packed batches, iterator state included."""
  from research.data.pipeline import Pipeline
  from research.data.sources import PydocTopics
  from research.interop import load

  tokenizer = load.load_model("smollm2-135m", packed=True).tokenizer
  rates = {}
  for rows, length in ((4, 256), (8, 1024)):
    data = Pipeline(
      source=PydocTopics(split="train"), length=length, batch_size=rows
    )
    batches = iter(data.training(tokenizer))
    next(batches)
    count = 300

    def read(batches=batches, count=count):
      for _ in itertools.islice(batches, count):
        pass

    rates[f"{rows}x{length}"] = rows * length * count / timing.seconds(read)
  return {
    "tokens_per_s": {k: round(v) for k, v in rates.items()},
    "demand": demand,
    "times_the_demand": round(min(rates.values()) / demand),
  }


def host(folder: pathlib.Path, steps: int = 400) -> dict:
  """Returns what `loop.fit` adds to a step, against bare compiled calls."""
  import jax
  import optax

  from research.data.pipeline import Pipeline
  from research.data.sources.synthetic import Copy
  from research.nn import presets
  from research.training import aot, loop, state
  from research.training.objectives import objective
  from research.training.reports import metrics
  from research.training.step import make_train_step

  sizes = presets.Sizes(
    vocab=16, width=8, depth=1, heads=1, kv_heads=1, hidden=8, head_dim=8
  )
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  data = Pipeline(source=Copy(vocab=8), length=16, batch_size=2)
  first = next(iter(data.training(None)))
  key = jax.random.key(0)
  params = model.init(key, first["tokens"])["params"]
  loss, tx = objective.NextToken(model=model), optax.sgd(1e-3)
  begun = state.create(params, ".", tx)
  loop.fit(
    loss,
    tx,
    begun,
    data.training(None),
    loop.TrainConfig(steps=steps),
    workdir=folder / "run",
  )
  records = metrics.read_jsonl(folder / "run" / "metrics.jsonl")
  whole = [r["train/seconds"] for r in records if "train/seconds" in r][50:]
  begun = state.create(params, ".", tx)
  update, _ = aot.compile_steps(make_train_step(loss, tx), begun, [first], key)
  moving = state.dataclasses.replace(begun, frozen=None)
  bare = []
  for _ in range(steps):
    begin = time.perf_counter()
    moving, _ = update(moving, begun.frozen, first, key)
    jax.block_until_ready(moving)
    bare.append(time.perf_counter() - begin)
  ours, alone = statistics.median(whole), statistics.median(bare[50:])
  return {
    "step_us": round(ours * 1e6),
    "bare_us": round(alone * 1e6),
    "added_us": round((ours - alone) * 1e6),
  }


def once(row: str, *options: str) -> dict:
  """Returns what a row measures, in a process of its own."""
  command = [sys.executable, "-m", "tests.bench.bench_loop", row, "--here"]
  done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f"{row}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def here(row: str, folder: pathlib.Path, args: argparse.Namespace) -> dict:
  """Returns what a row measures, in this process."""
  if row == "checkpoint":
    return checkpoint(folder, args.repeats)
  if row == "pipeline":
    return pipeline(folder, args.demand)
  return host(folder)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--demand", type=float, default=DEMAND)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  options = [f"--demand={args.demand}", f"--repeats={args.repeats}"]
  for row in args.rows or ROWS:
    if args.here:
      with tempfile.TemporaryDirectory(dir=".") as place:
        found = here(row, pathlib.Path(place).absolute(), args)
      found = {"row": row, **found}
    else:
      found = once(row, *options)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main()
