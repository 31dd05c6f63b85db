"""Heptad's side of the live comparisons: arrays in, arrays out.

  .venv/bin/python tests/peers/ours.py COMMAND --model M --out F [--rows F]

Runs in Heptad's own environment; the tests beside it run in the peers' and
call it as a process. `--rows` and `--out` are .npz files, but for `logits`,
whose output is a plain .npy, so that the reader can map it.

  logits    tokens [B, T] (positions)   -> [B, T, V]
  greedy    prompt [P], steps           -> tokens [steps], through the cache
  encode    text                        -> ids
  adapt     tokens, rank, std (targets, -> logits of a new adapter, which is
            rotated)                       left at --adapter in PEFT's format
  start     tokens, method              -> logits of a moved adapter of that
                                           method, left at --adapter
  rewrite   names, folder               -> nothing; each adapter of the folder
                                           is read and left below --adapter
  gradients tokens [B, T]               -> loss; d loss / d A and B are left at
                                           --adapter, written as an adapter
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import ours_diffusion  # noqa: E402
import ours_vision  # noqa: E402

from research import tree  # noqa: E402
from research.interop import load  # noqa: E402
from research.lora import adapt, wrap  # noqa: E402
from research.lora.methods.lora import LoRA  # noqa: E402
from research.nn import transformer  # noqa: E402
from research.quant.algorithms import rotate  # noqa: E402


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, positions=None):
  """Returns [B, T, V] logits."""
  variables = {"params": params}
  hidden, _ = model.apply(variables, tokens, positions)
  return model.apply(variables, hidden, method="logits")


def logits(it, args, rows) -> np.ndarray:
  tokens = rows["tokens"].astype(np.int32)
  places = rows.get("positions")
  return np.asarray(forward(it.model, it.params, tokens, places))


@functools.partial(jax.jit, static_argnums=(0, 3))
def continuation(model, params, prompt, steps):
  """Returns [steps] greedy tokens of a prompt [P], by cached decoding."""
  variables = {"params": params}
  cache = transformer.init_cache(model, params, 1, len(prompt) + steps)

  def read(tokens, cache):
    hidden, cache = model.apply(variables, tokens, cache=cache)
    best = model.apply(variables, hidden[:, -1], method="logits").argmax(-1)
    return best.astype(jnp.int32), cache

  def step(carry, _):
    token, cache = carry
    new, cache = read(token[:, None], cache)
    return (new, cache), token[0]

  first = read(prompt[None].astype(jnp.int32), cache)
  return jax.lax.scan(step, first, length=steps)[1]


def greedy(it, args, rows) -> dict:
  steps = int(rows["steps"])
  out = continuation(it.model, it.params, jnp.asarray(rows["prompt"]), steps)
  return dict(tokens=np.asarray(out))


def encode(it, args, rows) -> dict:
  return dict(ids=np.asarray(it.tokenizer.encode(str(rows["text"]))))


def adapt_and_save(it, args, rows) -> dict:
  """Linear layers, or targets, with b drawn too; saved where PEFT reads."""
  from research.interop import peft

  key = jax.random.key(0)
  rank, targets = int(rows["rank"]), adapt.ALL_LINEAR
  if "targets" in rows:
    targets = tuple(rows["targets"].tolist())
  method = LoRA(rank=rank, alpha=2.0 * rank)
  base = it.params
  if rows.get("rotated", False):
    base = rotate.Rotate(model=it.model)(base, key)
  params = adapt.Adapt(method=method, targets=targets)(base, key)
  std = float(rows["std"])

  def drawn(path, leaf):
    if not path.endswith("/b"):
      return leaf
    name = jax.random.fold_in(key, sum(map(ord, path)))
    return std * jax.random.normal(name, leaf.shape, leaf.dtype)

  params = tree.map_paths(drawn, params)
  peft.save_adapter(
    args.adapter, params, it.model, base_name=args.model, base=it.params
  )
  merged = forward(it.model, wrap.merge(params), rows["tokens"])
  whole = forward(it.model, params, rows["tokens"])
  return dict(logits=np.asarray(whole), merged_logits=np.asarray(merged))


def start_and_save(it, args, rows) -> dict:
  """An adapter of rank 4 on every linear layer, moved off its start."""
  from research.interop import peft
  from research.lora import methods

  method = methods.all_methods()[str(rows["method"])](rank=4)
  params = adapt.Adapt(method=method)(it.params, jax.random.key(0))

  def moved(path, x):
    if "/trained/" not in path:
      return x
    return x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)

  params = tree.map_paths(moved, params)
  peft.save_adapter(args.adapter, params, it.model, base_name=args.model)
  return dict(logits=np.asarray(forward(it.model, params, rows["tokens"])))


def rewrite(it, args, rows) -> dict:
  from research.interop import peft

  for name in rows["names"].tolist():
    read = pathlib.Path(str(rows["folder"])) / name
    params = peft.load_adapter(read, it.params, it.model)
    written = args.adapter / name
    peft.save_adapter(written, params, it.model, base_name=args.model)
  return {}


def gradients(it, args, rows) -> dict:
  """Mean next-token loss over every predicted token, and its gradients."""
  from research.interop import peft
  from research.training.objectives import objective

  tokens = jnp.asarray(rows["tokens"].astype(np.int32))
  count, length = tokens.shape
  batch = dict(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, axis=1),
    weights=jnp.ones((count, length)).at[:, -1].set(0.0),
    positions=jnp.tile(jnp.arange(length), (count, 1)),
    segments=jnp.zeros((count, length), jnp.int32),
  )
  selected, rest = tree.partition(it.params, wrap.TRAINABLE)
  goal = objective.NextToken(it.model)

  @jax.jit
  def mean(selected):
    params = tree.combine(selected, rest)
    total, weight, _ = goal(params, batch, jax.random.key(0))
    return total / weight

  loss, slopes = jax.value_and_grad(mean)(selected)
  written = tree.combine(slopes, rest)
  peft.save_adapter(args.adapter, written, it.model, base_name=args.model)
  return dict(loss=np.asarray(loss))


COMMANDS = dict(
  logits=logits,
  greedy=greedy,
  encode=encode,
  adapt=adapt_and_save,
  start=start_and_save,
  rewrite=rewrite,
  gradients=gradients,
  **ours_diffusion.COMMANDS,
  **ours_vision.COMMANDS,
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=COMMANDS)
  parser.add_argument("--model", required=True)
  parser.add_argument("--rows", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--adapter", type=pathlib.Path)
  parser.add_argument("--packed", action="store_true")
  args = parser.parse_args()
  towers = "all" if args.command in ours_vision.COMMANDS else "language"
  it = load.load_model(args.model, packed=args.packed, towers=towers)
  with np.load(args.rows, allow_pickle=False) as file:
    rows = dict(file)
  out = COMMANDS[args.command](it, args, rows)
  if isinstance(out, np.ndarray):
    np.save(args.out, out)
  else:
    np.savez(args.out, **out)


if __name__ == "__main__":
  main()
