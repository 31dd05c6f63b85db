"""Our side of the speed table; rows and measure as in `bench_torch`.

  .venv/bin/python tests/bench/bench_ours.py [ROW ...] [--runs 3] [--steps 3]

Each row runs in its own process and prints one JSON line. `compile_s` is what
a cold start would spend on compilation; it is not in tokens/s.
"""

import dataclasses
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

import bench_torch as table  # noqa: E402
import timing  # noqa: E402

RANK, ALPHA, RATE = 8, 16.0, 2e-4


def load(dtype: str):
  """Returns the real model and its token ids, the same as torch's.

  Args:
    dtype: of `table.DTYPES`; or "packed", the file's blocks, computed in fp32;
      or one of `formats`, the same numbers rounded to it; or a GGUF file of
      the model, whose blocks are kept.
  """
  from research.interop.load import load_model

  file = dtype.endswith(".gguf")
  of = "bfloat16" if dtype.endswith("BF16.gguf") else "float32"
  loaded = load_model(
    dtype if file else "smollm2-135m",
    dtype=table.DTYPES.get(dtype, of),
    packed=file or dtype == "packed",
  )
  if dtype in formats():
    rounded = in_panels(loaded.params, dtype)
    loaded = dataclasses.replace(loaded, params=rounded)
  from research.data.sources import PydocTopics

  texts = [PydocTopics("train")[i] for i in range(40)]
  ids = loaded.tokenizer.encode("\n".join(texts)[:60000])
  return loaded, ids


def formats() -> dict:
  """Returns formats of the rows that round the model's numbers, by name.

  Names have no underscore: a row's name is split there.
  """
  from research.quant.formats.affine import Affine
  from research.quant.formats.codebook import Codebook
  from research.quant.formats.ggml import GGML
  from research.quant.formats.iq4 import IQ4NL
  from research.quant.formats.microscaling import Microscaling
  from research.quant.formats.nvfp4 import NVFP4

  return {
    "nf4": Codebook(nested=0),
    "nf4dq": Codebook(),
    "int4": Affine(block=64),
    "int4order": Affine(block=64),
    "int8": Affine(bits=8, block=32, symmetric=True),
    "q40": GGML(kind="Q4_0"),
    "iq4nl": IQ4NL(),
    "mxfp4": Microscaling(),
    "nvfp4": NVFP4(),
  }


def in_panels(params, kind: str):
  """Returns `params`, every matrix in a format, and that in panels."""
  import numpy as np

  from research import tree
  from research.quant import qtensor
  from research.quant.layouts.cpu_layout import from_qtensor

  format, rng = formats()[kind], np.random.default_rng(0)

  def leaf(path, w):
    if path.endswith("scale"):
      return w
    embed = path == "embed"
    packed = qtensor.pack(np.asarray(w).T if embed else w, format)
    if embed:
      packed = dataclasses.replace(packed, axis=-1)
    elif kind.endswith("order"):
      # As act-order leaves rows; what is multiplied are other numbers.
      order = rng.permuted(np.tile(np.arange(w.shape[-2]), (len(w), 1)), axis=1)
      packed = dataclasses.replace(packed, order=order.astype(np.int32))
    return from_qtensor(packed)

  return tree.map_paths(leaf, params)


def train(dtype: str, runs: int, steps: int, method=None) -> dict:
  """Times whole optimizer steps of adapters on every linear layer.

  Args:
    dtype: of the base and of activations.
    runs, steps: see `timing.tokens_per_s`.
    method: of adaptation; LoRA if None.
  """
  import jax
  import numpy as np

  from research import tree
  from research.lora import adapt, wrap
  from research.lora.methods.lora import LoRA
  from research.optim import optim
  from research.training import aot, state, step
  from research.training.objectives import objective

  loaded, ids = load(dtype)
  transform = adapt.Adapt(method=method or LoRA(rank=RANK, alpha=ALPHA))
  params = transform(loaded.params, jax.random.key(0))
  tx = optim.adamw(RATE, weight_decay=0.01, clip=None)
  start = state.create(params, wrap.TRAINABLE, tx)
  model = loaded.model.clone(remat="names")
  rows = np.asarray(ids[: table.BATCH * (table.LENGTH + 1)], np.int32).reshape(
    table.BATCH, -1
  )
  batch = dict(
    tokens=rows[:, :-1],
    targets=rows[:, 1:],
    weights=np.ones_like(rows[:, 1:], np.float32),
    positions=np.broadcast_to(
      np.arange(table.LENGTH, dtype=np.int32), rows[:, 1:].shape
    ),
    segments=np.zeros_like(rows[:, 1:]),
  )
  key = jax.random.key(0)
  update = step.make_train_step(objective.NextToken(model), tx)
  run, cost = aot.compile_steps(update, start, [batch], key)
  frozen = start.frozen
  held = {"state": start.__class__(
    start.step, start.trainable, None, start.opt_state
  )}  # fmt: skip
  del start, params, loaded
  losses = []

  def once():
    held["state"], metrics = run(held["state"], frozen, batch, key)
    losses.append(float(metrics["loss"]))

  out = timing.tokens_per_s(once, table.BATCH * table.LENGTH, runs, steps)
  return out | dict(
    trainable=tree.count(held["state"].trainable),
    loss_first=round(losses[0], 4),
    loss_last=round(losses[-1], 4),
    compile_s=round(cost["compile/seconds"], 2),
    temporary_mb=round(cost["compile/temporary_bytes"] / 2**20),
  )


def decode(batch: int, dtype: str, runs: int, steps: int) -> dict:
  """Times greedy decoding, prefill within."""
  from research.generation import generate
  from research.quant.layouts import cpu_layout

  loaded, ids = load(dtype)
  size = table.PROMPT
  prompts = [ids[i * size : (i + 1) * size] for i in range(batch)]
  model = loaded.model
  params = cpu_layout.for_decoding(loaded.params, model.dtype)
  params = generate.prepare(params, model)
  del loaded

  def once():
    generate.generate(model, params, prompts, table.NEW)

  first = timing.seconds(once)
  out = timing.tokens_per_s(once, batch * table.NEW, runs, steps)
  spent = batch * table.NEW / out["tokens_per_s"]
  return out | dict(compile_s=round(first - spent, 2))


def prefill(batch: int, dtype: str, runs: int, steps: int) -> dict:
  """Times reading prompts and choosing one token, which needs no step."""
  from research.generation import generate
  from research.quant.layouts import cpu_layout

  loaded, ids = load(dtype)
  size = table.PREFILL
  prompts = [ids[i * size : (i + 1) * size] for i in range(batch)]
  model = loaded.model
  params = cpu_layout.for_decoding(loaded.params, model.dtype)
  params = generate.prepare(params, model)
  del loaded
  return timing.tokens_per_s(
    lambda: generate.generate(model, params, prompts, 1),
    batch * size,
    runs,
    steps,
  )


def perplexity(dtype: str, runs: int, steps: int) -> dict:
  """Times one window as `experiments.perplexity` reads it."""
  from research.generation.perplexity import perplexity as measure
  from research.quant.layouts import cpu_layout

  loaded, ids = load(dtype)
  params = cpu_layout.for_reading(loaded.params, loaded.model, table.WINDOW)
  row = ids[: table.WINDOW]
  last = {}

  def once():
    last["nll"] = measure(loaded.model, params, row, table.WINDOW).nll

  first = timing.seconds(once)
  out = timing.tokens_per_s(once, table.WINDOW, runs, steps)
  spent = table.WINDOW / out["tokens_per_s"]
  return out | dict(
    nll=round(last["nll"], 4), compile_s=round(first - spent, 2)
  )


def measure(row: str, runs: int, steps: int, threads: int) -> dict:
  """Runs one row in this process."""
  import jax

  from research.training.memory import peak_memory_bytes

  del threads  # XLA uses the cores that the process may use
  kind, _, rest = row.partition("_")
  if kind in ("decode", "prefill"):
    work = {"decode": decode, "prefill": prefill}[kind]
    batch, _, dtype = rest.partition("_")
    out = work(int(batch[1:]), dtype, runs, steps)
  else:
    work = {"train": train, "perplexity": perplexity}[kind]
    out = work(rest, runs, steps)
  return dict(
    row=row, **out, peak_rss_bytes=peak_memory_bytes(), jax=jax.__version__
  )


if __name__ == "__main__":
  row, *options = sys.argv[1:]
  chosen = dict(option.lstrip("-").split("=") for option in options)
  steps = int(chosen.get("steps", 3 if row.startswith("train") else 1))
  print(json.dumps(measure(row, int(chosen.get("runs", 3)), steps, 2)))
