"""Language models that see images by cross-attention, not in their input.

A pretrained model gets new layers (`interleave`) and their weights
(`add_layers`) among its own. `with_media` computes each layer's keys and values
of a batch of images, once, however many tokens are generated.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from research import tree
from research.nn.cross_attention import GatedCrossAttention, Media
from research.nn.stack import Stack
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, PRNGKey, UserError


def interleave(
  model: Transformer, layer: GatedCrossAttention, every: int, first: int = 0
) -> Transformer:
  """Returns `model` with a cross-attention layer before every n-th layer.

  Args:
    layer: the new layer.
    every: n; Flamingo's is 1, 4 and 7 for 3, 9 and 80 billion parameters.
    first: the first layer, counted from 0, that has one before it: 0 in
      Idefics, n - 1 in OpenFlamingo.

  Raises:
    UserError: `first` is not below `every`, or no layer would be added.
  """
  if not 0 <= first < every or first >= model.stack.depth:
    raise UserError(
      f"interleave: found every {every} and first {first}, expected first to be"
      f" at least 0 and below both every and {model.stack.depth} layers"
    )
  own = model.stack.blocks
  blocks = tuple(
    own[i % len(own)].clone(cross=layer if i % every == first else None)
    for i in range(math.lcm(every, len(own)))
  )
  return model.clone(stack=Stack(model.stack.depth, blocks))


def add_layers(
  model: Transformer, params: Params, key: PRNGKey
) -> dict[str, Any]:
  """Returns a pretrained model's parameters, with new layers among them."""
  kinds, layers = model.layer_kinds(), list(tree.layers(params))
  x = jnp.zeros((1, 1, model.width), model.dtype)
  for i, kind in enumerate(kinds):
    if kind.cross is not None:
      new = kind.cross.init(jax.random.fold_in(key, i), x)["params"]
      layers[i] = {**layers[i], "cross": new}
  return tree.stack(tree.outer_params(params), layers, kinds)


def with_media(
  model: Transformer,
  params: Params,
  media: Float[Array, "B S C"],
  sizes: Int[Array, "B M"],
  token: int,
) -> dict[str, Any]:
  """Returns a language model's parameters, whose layers see these images.

  Args:
    model: from `interleave`.
    media: what the connector makes of each row's images, one after the other.
    sizes: how many vectors of `media` each image has.
    token: id of the token that stands for an image, a row of the vocabulary.

  Raises:
    UserError: the model has no cross-attention, or no such token.
  """
  if not any(block.cross is not None for block in model.stack.blocks):
    raise UserError(
      "found images for a language model without cross-attention; expected one"
      " from research.vlm.cross_attention.interleave"
    )
  if token >= model.vocab_size:
    raise UserError(
      f"image_token: found {token}, expected a token of the vocabulary of"
      f" {model.vocab_size}, since the model reads it like any other"
    )
  media, out = media.astype(model.dtype), dict(params)
  for name, _, blocks in model.stack.runs(params):
    out[name] = dict(params[name])
    for j, block in enumerate(blocks):
      if block.cross is not None:
        layers = params[name][f"layer{j}"]
        made = _keys_and_values(block.cross, layers["cross"], media, sizes)
        new = {**layers["cross"], "media": Media(*made, token)}
        out[name][f"layer{j}"] = {**layers, "cross": new}
  return out


def _keys_and_values(cross, layers, media, sizes):
  def one(own):
    return cross.attention.apply(
      {"params": own}, media, method="keys_and_values"
    )

  keys, values = jax.lax.map(one, layers["attention"])
  return keys, values, jnp.broadcast_to(sizes, (keys.shape[0], *sizes.shape))


@dataclasses.dataclass(frozen=True)
class LatestImage:
  """Text attends to the soft tokens of the image before it, in some layers.

  Flamingo's placement (`interleave`). A prompt has one placeholder for each
  view, however many soft tokens that has.
  """

  def __call__(
    self,
    model: Transformer,
    params: Params,
    soft: Float[Array, "B P C"],
    grids: Int[Array, "B V 2"],
    token: int,
    pool: int = 1,
  ) -> dict[str, Any]:
    """Returns the language model's parameters; arguments as for `Splice`.

    Raises:
      UserError: rows share their views.
    """
    if pool > 1:
      raise UserError(
        f"LatestImage: found views that {pool} rows share, expected views of"
        " each row's own; set Bucket.pool = 1"
      )
    sizes = jnp.prod(grids, axis=-1, dtype=jnp.int32)
    return with_media(model, params, soft, sizes, token)
