"""What each tower of a vision language model takes of a training step."""

from typing import Any

import jax

from experiments.planning.abstract_step import AbstractStep
from research import sharding, tree, weights
from research.planning.text import format_bytes
from research.vlm import arithmetic
from research.vlm.images.plan import Plan
from research.vlm.model import TOWERS, VisionLanguageModel


def shares(abstract: AbstractStep) -> dict[str, dict[str, Any]]:
  """Returns each tower's FLOPs, weights and bytes; nothing for other models.

  FLOPs are the model's own, all devices together, by `training_flops`. Bytes
  are those of a device: weights and the optimizer's state.

  Args:
    abstract: a training step.
  """
  model = abstract.loaded.model
  if not isinstance(model, VisionLanguageModel):
    return {}
  rows, views, height, width, _ = abstract.batch["pixels"].shape
  trained = [
    name for name in TOWERS if jax.tree.leaves(abstract.state.trainable[name])
  ]
  flops = arithmetic.training_flops(
    model,
    _plan(model, views, height, width),
    abstract.batch["tokens"].shape[1],
    trained,
  )
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


def _plan(model, views: int, height: int, width: int) -> Plan:
  """Returns a plan of views of one size, however they were cut."""
  patches = model.grid(height, width)
  side = model.tokens_per_view(height, width)
  return Plan(
    size=(height, width),
    content=(height, width),
    canvas=(height, width),
    rows=0,
    columns=0,
    views=views,
    view=(height, width),
    patches=patches,
    grids=((1, side),) * views,
  )


def _bytes(state: Any, name: str) -> int:
  """Returns the bytes of a tower's part of the state, on a device."""
  own = [x for path, x in tree.flatten_paths(state) if name in path.split("/")]
  return sharding.bytes_per_device(own, [x.sharding for x in own])
