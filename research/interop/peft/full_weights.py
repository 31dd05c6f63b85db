"""What a PEFT adapter brings whole: biases, modules_to_save, embeddings.

research/lora/MATH.md 7.1 to 7.4. A tied model that gets an embedding or a head
of its own is not tied any more, unless `ensure_weight_tying` says that both are
meant (PEFT's issue 2777).
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.interop import hf
from research.interop.parts import Address
from research.interop.peft.names import PREFIX, USUAL, Naming
from research.interop.peft.targets import is_saved
from research.lora import wrap
from research.lora.methods.tokens import NESTED_PREFIX
from research.nn.transformer import Transformer
from research.quant import untied_embedding
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Weight:
  """A parameter of the base under PEFT's names.

  Attributes:
    address: ours: `layers/3/attention/q_bias`.
    module, name: `model.layers.3.self_attn.q_proj` and `bias`.
    transposed: whether theirs is ours, transposed.
  """

  address: str
  module: str
  name: str
  transposed: bool


def base_weights(
  params: Params, model: Transformer, naming: Naming = USUAL
) -> dict[str, Weight]:
  """Returns every parameter of a model by its address, but stacked experts.

  PEFT's files name those by no module, so none is kept whole or adapted; nor
  what no file has but ours.
  """
  rows, paths = (
    hf.table(model),
    [p for p, _ in wrap.leaves(tree.outer_params(params))],
  )
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in wrap.leaves(params[run][layer]):
      if len(leaf.shape) < 4:
        paths += [f"layers/{i}/{path}" for i in layers]
  out = {}
  for path in paths:
    try:
      theirs, transposed = rows.theirs(Address.parse(path))
    except KeyError:
      continue
    module, _, name = naming.theirs(theirs).rpartition(".")
    out[path] = Weight(path, module, name, transposed)
  return out


def required(
  found: Mapping[str, Weight],
  adapted: Collection[str],
  saved: Sequence[str],
  bias: str,
) -> dict[str, Weight]:
  """Returns what the file must hold whole, by its key."""
  out = {}
  for w in found.values():
    if is_saved(w.module, saved):
      out[f"{PREFIX}{w.module}.{w.name}"] = w
    elif w.name == "bias" and bias != "none":
      if w.module in adapted:
        out[f"{PREFIX}{w.module}.base_layer.bias"] = w
      elif bias == "all":
        out[f"{PREFIX}{w.module}.bias"] = w
  return out


def embeddings(
  found: Mapping[str, Weight],
  tied: bool,
  taken: Collection[str],
  adapted: Collection[str],
  naming: Naming = USUAL,
  rows: Collection[str] = (),
) -> dict[str, Weight]:
  """Returns the embeddings that a file may hold besides, by key.

  PEFT writes both where one is adapted or the vocabulary has grown; of a tied
  model the head's is a copy.
  """
  out = {}
  for module in (naming.embedding, naming.head):
    middle = ".base_layer." if module in {*adapted, *rows} else "."
    middle = f".{NESTED_PREFIX}base_layer." if module in rows else middle
    key = f"{PREFIX}{module}{middle}weight"
    first = module == naming.embedding
    address = "embed" if first or tied else "head"
    if key not in taken:
      out[key] = found[address]
  return out


def replace(params: Params, values: Mapping[str, np.ndarray]) -> Any:
  """Returns `params` with other values at some addresses.

  Args:
    params: any tree of weights; what stays is shared.
    values: in our orientation, by address. Each takes its predecessor's type,
      or float32 where that was packed, as then do other layers of its run.
  """

  def new(leaf, value):
    dtype = jnp.float32 if weights.is_weight(leaf) else leaf.dtype
    return jnp.asarray(value).astype(dtype)

  def top(path, leaf):
    return new(leaf, values[path]) if path in values else leaf

  out = tree.map_paths(
    top, tree.outer_params(params), is_leaf=weights.is_weight
  )
  indices = tree.layer_indices(params)
  for run in tree.runs(params):

    def inside(path, leaf, run=run):
      layer, inner = path.split("/", 1)
      rows = indices[f"{run}/{layer}"]
      paths = {k: f"layers/{i}/{inner}" for k, i in enumerate(rows)}
      given = {k: values[p] for k, p in paths.items() if p in values}
      if not given:
        return leaf
      if len(given) == len(rows):
        return new(leaf, np.stack([given[k] for k in range(len(rows))]))
      packed = weights.is_weight(leaf)
      stacked = np.array(weights.dense(leaf), np.float32 if packed else None)
      for k, value in given.items():
        stacked[k] = value.astype(stacked.dtype)
      return jnp.asarray(stacked)

    out[run] = tree.map_paths(inside, params[run], is_leaf=weights.is_weight)
  return out


def untie(
  params: Params, model: Transformer
) -> tuple[dict[str, Any], Transformer]:
  """Returns the same function with a head of its own."""
  if isinstance(params["embed"], untied_embedding.Untied):
    model, params = untied_embedding.untie(model, params)
    return dict(params), model
  head = jnp.asarray(weights.dense(params["embed"])).T
  return dict(params) | {"head": head}, model.clone(tied=False)
