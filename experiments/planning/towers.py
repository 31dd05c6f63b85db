"""What each tower of a vision language model takes of a training step."""

import math
from typing import Any

import jax

from experiments.planning.abstract_step import AbstractStep
from research import sharding, tree, weights
from research.planning.text import format_bytes
from research.vlm import arithmetic
from research.vlm.images.plan import Plan
from research.vlm.model import TOWERS, VisionLanguageModel


def shares(abstract: AbstractStep) -> dict[str, dict[str, Any]]:
  """Returns each tower's FLOPs, weights and bytes.

  Nothing for other models, and for batches without images to encode.

  FLOPs are the model's own, all devices together, by `training_flops`. Bytes
  are those of a device: weights and the optimizer's state.
  """
  model, batch = abstract.loaded.model, abstract.batch
  if not isinstance(model, VisionLanguageModel):
    return {}
  if not {"pixels", "patches"} & set(batch):
    return {}
  trained = [
    name for name in TOWERS if jax.tree.leaves(abstract.state.trainable[name])
  ]
  flops = arithmetic.training_flops(
    model,
    _plan(model, batch),
    batch["tokens"].shape[1],
    trained,
  )
  rows = len(batch["patches" if "patches" in batch else "pixels"])
  params = abstract.state.params
  return {
    name: {
      "flops": rows * flops[name],
      "flops_share": flops[name] / sum(flops.values()),
      "parameters": weights.count(params[name]),
      "trained": name in trained,
      "state_bytes": _bytes(abstract.state, name),
    }
    for name in TOWERS
  }


def describe(found: dict[str, dict[str, Any]]) -> str:
  """Returns the result of `shares` as lines of text."""
  return "\n".join(
    f"{name}: {x['flops_share']:.1%} of the model's FLOPs,"
    f" {x['parameters']:,} parameters, {format_bytes(x['state_bytes'])} a"
    f" device, {'trained' if x['trained'] else 'frozen'}"
    for name, x in found.items()
  )


def _plan(model: VisionLanguageModel, batch: Any) -> Plan:
  """Returns a plan of a row's views, however they were cut."""
  if "patches" in batch:
    # The grid that is nearest to a square, of as many patches.
    views, count = batch["patches"].shape[1:3]
    squares = count // model.square**2
    high = next(n for n in range(math.isqrt(squares), 0, -1) if not squares % n)
    patches = model.square * high, model.square * (squares // high)
    height, width = (n * model.vision.patch for n in patches)
  else:
    views, height, width, _ = batch["pixels"].shape[1:]
    patches = model.grid(height, width)
  grids = ((1, model.tokens_per_view(height, width)),) * views
  if "groups" in batch:
    grids = ((1, batch["groups"].shape[-2]),)
  return Plan(
    size=(height, width),
    content=(height, width),
    canvas=(height, width),
    rows=0,
    columns=0,
    views=views,
    view=(height, width),
    patches=patches,
    grids=grids,
  )


def _bytes(state: Any, name: str) -> int:
  """Returns the bytes of a tower's part of the state, on a device."""
  own = [x for path, x in tree.flatten_paths(state) if name in path.split("/")]
  return sharding.bytes_per_device(own, [x.sharding for x in own])
