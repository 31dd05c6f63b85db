"""Masked diffusion: sampling and training, ours against torch, side by side.

  make bench ARGS='diffusion_sample_b1 diffusion_dual_b1 --repeats=3'
  .venv/bin/python tests/bench/bench_diffusion.py ours ROW [RUNS]
  .venv-peers/bin/python tests/bench/bench_diffusion.py torch ROW [RUNS]

A LLaDA of 12M parameters, whose head has the share of the 8B's; fp32.

  diffusion_sample_b{1,8}  64 + 128 tokens in blocks of 32 and 64 steps, against
                           the loop of LLaDA's `generate` (`torch_llada`)
  diffusion_dual_b{1,8}    the same, ours with the dual cache; torch's loop has
                           none
  diffusion_train          whole steps of LLaDA's pre-training, AdamW, 8 x 256

  .venv/bin/python tests/bench/bench_diffusion.py ours diffusion_products_b1

is tokens a second if a call without a cache were its matrix products and
nothing else, each as XLA computes it: what they allow. The last layer's are of
the block alone but for keys and values.

Both sides fill the same weights' rows greedily; `same` is the share of equal
tokens, 1 but for near ties, and less with the cache, an approximation. `host`
is the share of the time that our sampler is not in a compiled program.
"""

import json
import os
import pathlib
import resource
import sys
import tempfile
import time

ROWS = (
  "diffusion_sample_b1",
  "diffusion_sample_b8",
  "diffusion_dual_b1",
  "diffusion_dual_b8",
  "diffusion_train",
)
MASK = 2047
PROMPT, NEW, BLOCK, STEPS = 64, 128, 32, 64
BATCH, LENGTH = 8, 256
CONFIG = dict(
  architectures=["LLaDAModelLM"],
  model_type="llada",
  activation_type="silu",
  block_type="llama",
  d_model=384,
  embedding_size=2048,
  eos_token_id=None,
  layer_norm_type="rms",
  mask_token_id=MASK,
  max_sequence_length=512,
  mlp_hidden_size=1152,
  n_heads=6,
  n_kv_heads=6,
  n_layers=6,
  rms_norm_eps=1e-5,
  rope=True,
  rope_theta=500_000.0,
  vocab_size=2048,
  weight_tying=False,
)


def weights():
  """Returns the same random weights on both sides, under LLaDA's names."""
  import numpy as np

  rng = np.random.default_rng(0)
  d, f, v = (CONFIG[k] for k in ("d_model", "mlp_hidden_size", "vocab_size"))
  shapes = {"wte": (v, d), "ff_out": (v, d), "ln_f": (d,)}
  for i in range(CONFIG["n_layers"]):
    layer = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (d, d))
    layer |= dict(ff_proj=(f, d), up_proj=(f, d), ff_out=(d, f))
    layer |= dict(attn_norm=(d,), ff_norm=(d,))
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
  out = {}
  for name, shape in shapes.items():
    scale = 1.0 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5
    x = rng.standard_normal(shape) if len(shape) == 2 else np.ones(shape)
    out[f"model.transformer.{name}.weight"] = (scale * x).astype(np.float32)
  return out


def tokens(rows: int, length: int):
  import numpy as np

  rng = np.random.default_rng(1)
  return rng.integers(0, MASK, (rows, length))


def loaded():
  """Returns our model of the weights, read from a file under their names."""
  import safetensors.numpy

  from research.interop.load import load_model

  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file(weights(), folder / "model.safetensors")
    return load_model(folder)


def ours_sample(batch: int, dual: bool, runs: int) -> dict:
  """Times our sampler."""
  import jax
  import timing

  from research.diffusion.sampling import sampler
  from research.diffusion.sampling.config import SamplerConfig
  from research.diffusion.sampling.denoiser import BlockCache, NoCache
  from research.generation import generate

  it = loaded()
  # As experiments.generate does.
  params = generate.prepare(it.params, it.model)
  prompts = tokens(batch, PROMPT).tolist()
  asked = (BlockCache if dual else NoCache)(model=it.model)
  options = SamplerConfig(
    mask_id=MASK, length=NEW, block=BLOCK, steps=STEPS, stop_early=False
  )
  last = {}

  def once():
    state = sampler.start(prompts, options, jax.random.key(0))
    got = sampler.sample(asked, params, state, options)
    last["tokens"] = got.tokens[:, PROMPT:]

  compile_s = timing.seconds(once)
  programs = sampler.fill_block._cache_size()
  out = timing.tokens_per_s(once, batch * NEW, runs)
  if sampler.fill_block._cache_size() != programs:
    raise RuntimeError("the sampler compiled again for rows of the same shape")
  return out | dict(
    tokens=last["tokens"].tolist(),
    compile_s=round(compile_s, 2),
    host=round(host_share(once, sampler), 4),
  )


def ours_products(batch: int, runs: int) -> dict:
  """Times the products of a call without a cache, one after another."""
  import jax
  import jax.numpy as jnp
  import timing

  from research.generation import generate

  it = loaded()
  params = generate.prepare(it.params, it.model)
  depth, heads = CONFIG["n_layers"], CONFIG["n_heads"]

  def seen(q, k, v):
    """Returns attention's two products."""
    q, k, v = (
      x.reshape(batch, -1, heads, x.shape[-1] // heads).swapaxes(1, 2)
      for x in (q, k, v)
    )
    y = (q @ k.swapaxes(2, 3)) @ v
    return y.swapaxes(1, 2).reshape(-1, CONFIG["d_model"])

  def call(params, x):
    for i in range(depth):
      layer = jax.tree.map(lambda w: w[0], params[f"run{i}"]["layer0"])
      own = x[: batch * BLOCK] if i == depth - 1 else x
      attention, mlp = layer["attention"], layer["mlp"]
      qkv = own @ attention["q"], x @ attention["k"], x @ attention["v"]
      y = seen(*jax.lax.optimization_barrier(qkv)) @ attention["o"]
      gate, up = jax.lax.optimization_barrier((y @ mlp["gate"], y @ mlp["up"]))
      x = (gate + up) @ mlp["down"]
    return x @ params["head"]

  x = jnp.full((batch * (PROMPT + NEW), CONFIG["d_model"]), 1e-3)
  run = jax.jit(call)

  def once():
    for _ in range(STEPS):
      jax.block_until_ready(run(params, x))

  return timing.tokens_per_s(once, batch * NEW, runs)


def host_share(once, sampler) -> float:
  """Returns the share of a run that is not spent in the compiled blocks."""
  import jax
  import timing

  compiled, spent = sampler.fill_block, []

  def watched(*args):
    begin = time.perf_counter()
    out = jax.block_until_ready(compiled(*args))
    spent.append(time.perf_counter() - begin)
    return out

  sampler.fill_block = watched
  whole = timing.seconds(once)
  sampler.fill_block = compiled
  return 1 - sum(spent) / whole


def ours_train(runs: int) -> dict:
  """Times our optimizer step."""
  import jax
  import numpy as np
  import timing

  from research import tree
  from research.diffusion.objective import MaskedDiffusion
  from research.optim import optim
  from research.training import aot, state, step

  it = loaded()
  tx = optim.adamw(1e-4, weight_decay=0.01, clip=None)
  # Experiment.transforms = (@tree.split_last_layer,)
  begun = state.create(tree.split_last_layer(it.params), ".", tx)
  rows = tokens(BATCH, LENGTH).astype(np.int32)
  place = np.arange(LENGTH, dtype=np.int32)
  batch = dict(
    tokens=rows,
    targets=np.roll(rows, -1, axis=1),
    weights=np.ones(rows.shape, np.float32),
    positions=np.broadcast_to(place, rows.shape),
    segments=np.zeros_like(rows),
  )
  # As experiments.train does unless told otherwise.
  model = it.model.clone(remat="names")
  loss = MaskedDiffusion(model=model, mask_id=MASK)
  key = jax.random.key(0)
  run, cost = aot.compile_steps(
    step.make_train_step(loss, tx), begun, [batch], key
  )
  frozen = begun.frozen
  held = [state.dataclasses.replace(begun, frozen=None)]
  losses = []

  def once():
    held[0], metrics = run(held[0], frozen, batch, key)
    losses.append(float(metrics["loss"]))

  out = timing.tokens_per_s(once, BATCH * LENGTH, runs * 3)
  return out | dict(
    loss_first=round(losses[0], 3), compile_s=round(cost["compile/seconds"], 2)
  )


def ours(row: str, runs: int) -> dict:
  from research.training.memory import peak_memory_bytes

  _, kind, *size = row.split("_")
  if kind == "train":
    out = ours_train(runs)
  elif kind == "products":
    out = ours_products(int(size[0][1:]), runs)
  else:
    out = ours_sample(int(size[0][1:]), kind == "dual", runs)
  return out | dict(peak_rss_bytes=peak_memory_bytes())


def theirs(row: str, runs: int) -> dict:
  """Times torch's side."""
  import torch
  import torch_llada

  torch.set_num_threads(2)
  torch.manual_seed(0)
  model = torch_llada.Llada(
    CONFIG, {k: torch.from_numpy(v) for k, v in weights().items()}
  )
  if row == "diffusion_train":
    out = torch_train(model, runs)
  else:
    out = torch_sample(model, int(row.rsplit("_b", 1)[1]), runs)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return out | dict(peak_rss_bytes=peak)


def torch_sample(model, batch: int, runs: int) -> dict:
  import timing
  import torch
  import torch_llada

  prompt = torch.from_numpy(tokens(batch, PROMPT))
  last = {}

  def once():
    found = torch_llada.generate(model, prompt, MASK, NEW, BLOCK, STEPS)
    last["tokens"] = found[:, PROMPT:]

  with torch.inference_mode():
    out = timing.tokens_per_s(once, batch * NEW, runs)
  return out | dict(tokens=last["tokens"].tolist())


def torch_train(model, runs: int) -> dict:
  import timing
  import torch
  import torch_llada

  chosen = list(model.weights.values())
  for x in chosen:
    x.requires_grad_(True)
  optimizer = torch.optim.AdamW(chosen, lr=1e-4, weight_decay=0.01)
  rows = torch.from_numpy(tokens(BATCH, LENGTH))
  losses = []

  def once():
    optimizer.zero_grad(set_to_none=True)
    loss = torch_llada.loss(model, rows, MASK)
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))

  out = timing.tokens_per_s(once, BATCH * LENGTH, runs * 3)
  return out | dict(loss_first=round(losses[0], 3))


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns medians and ratios of each row; sides alternate.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  from tests.bench import sides  # the script alone does not see it

  keys = ("tokens_per_s", "peak_rss_bytes")
  found = []
  for row in names:
    line, pairs = sides.compare(__file__, row, peers, repeats, keys)
    line |= {k: pairs[0][0].get(k) for k in ("compile_s", "host")}
    line["same"] = same(*pairs[0])
    found.append(line)
    print(f"  {json.dumps(line)}", file=sys.stderr, flush=True)
  return found


def same(one: dict, other: dict) -> float | None:
  """Returns the share of tokens that are the same on both sides."""
  if "tokens" not in one:
    return None
  pairs = [
    a == b
    for row, theirs in zip(one["tokens"], other["tokens"], strict=True)
    for a, b in zip(row, theirs, strict=True)
  ]
  return sum(pairs) / len(pairs)


def show(found: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| row | ours tok/s | torch tok/s | ratio (min..max) | same tokens | host "
    "| compile s | ours GiB | torch GiB |",
    "| --- " * 9 + "|",
  ]
  for r in found:
    cells = [
      r["row"],
      f"{r['ours_tokens_per_s']:.0f}",
      f"{r['torch_tokens_per_s']:.0f}",
      f"{r['ratio']:.2f} ({min(r['ratios']):.2f}..{max(r['ratios']):.2f})",
      "-" if r["same"] is None else f"{r['same']:.0%}",
      "-" if r["host"] is None else f"{r['host']:.1%}",
      str(r["compile_s"]),
      f"{r['ours_peak_rss_bytes'] / 2**30:.2f}",
      f"{r['torch_peak_rss_bytes'] / 2**30:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.path[:0] = [str(pathlib.Path(__file__).parent), os.getcwd()]
  side, row, *counts = sys.argv[1:]
  work = {"ours": ours, "torch": theirs}[side]
  runs = int(counts[0]) if counts else 1 if row.endswith("b8") else 2
  print(json.dumps(work(row, runs)))
