"""Small versions of published models' parts, for tests."""

import dataclasses
from typing import Any

from research.nn.gemma4 import Gemma4Sizes
from research.nn.presets import Sizes
from research.nn.rope import Axes
from research.nn.transformer import Transformer
from research.vlm.encoders.vit import Features, VisionTransformer

SMALLEST = 16
"""Width of a head, at least; a multiple of 4, so that rotary axes can share
it."""


def less(size: int, shrink: int, least: int = SMALLEST) -> int:
  """Returns a size over `shrink`, `least` at least."""
  return max(least, size // shrink)


def encoder(model: VisionTransformer, shrink: int) -> VisionTransformer:
  """Returns an encoder of fewer and narrower layers, the last ones' kinds."""
  stack = _layers(model.stack, shrink)
  attention = stack.blocks[0].attention
  return model.clone(width=attention.heads * attention.head_dim, stack=stack)


def _layers(stack, shrink: int):
  depth = less(stack.depth, shrink, 2)
  blocks = tuple(
    block.clone(
      attention=block.attention.clone(
        head_dim=less(block.attention.head_dim, shrink)
      ),
      mlp=block.mlp.clone(hidden=less(block.mlp.hidden, shrink)),
    )
    for block in stack.blocks[-depth:]
  )
  return dataclasses.replace(stack, depth=depth, blocks=blocks)


def features(published: Features, depth: int) -> Features:
  """Returns features of the nearest layers that an encoder has."""
  nearest = tuple(max(-depth - 1, min(i, depth)) for i in published.layers)
  return dataclasses.replace(published, layers=nearest)


def language(
  published: Sizes | Gemma4Sizes | Transformer,
  shrink: int,
  least: int,
  *,
  rotated: bool = False,
) -> Any:
  """Returns a language model of fewer and narrower layers, of the same type.

  Args:
    least: layers, at least.
    rotated: whether tokens have several coordinates, which share a head.
  """
  if isinstance(published, Transformer):
    return published.clone(
      width=less(published.width, shrink),
      stack=_layers(published.stack, shrink),
    )
  sizes = dict(
    width=less(published.width, shrink),
    hidden=less(published.hidden, shrink),
    head_dim=less(published.head_dim, shrink, SMALLEST * (1 + rotated)),
  )
  if isinstance(published, Gemma4Sizes):
    return dataclasses.replace(published, **sizes, **_gemma4(published, shrink))
  sizes["depth"] = less(published.depth, shrink, least)
  return dataclasses.replace(published, **sizes)


def _gemma4(sizes: Gemma4Sizes, shrink: int) -> dict[str, Any]:
  """Returns a layer of each kind, and of each kind that borrows."""
  borrows = sizes.kv_shared_layers > 0
  return dict(
    kinds=("local", "global") * (1 + borrows),
    kv_shared_layers=2 * borrows,
    global_head_dim=less(sizes.global_head_dim, shrink),
    kv_shared_hidden=less(sizes.kv_shared_hidden, shrink),
    per_layer=less(sizes.per_layer, shrink, 4) if sizes.per_layer else 0,
  )


def positions(axes: Axes | None, published: Any, smaller: Any) -> Axes | None:
  """Returns the axes' same shares of a smaller head."""
  if axes is None:
    return None
  sizes = tuple(x * smaller.head_dim // published.head_dim for x in axes.sizes)
  return dataclasses.replace(axes, sizes=sizes)
