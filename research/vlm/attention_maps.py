"""What a token attends to: the weights of a layer, and where on the image.

Kernels never write attention weights down, so they are computed here again, by
their formula (Vaswani et al. 2017, arXiv:1706.03762, equation 1), for one layer
of a prompt. That they are the model's is tested: with them, values give what
the kernels give.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import tree, weights
from research.nn.block import Block
from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, UserError
from research.vlm.images.plan import Plan


def attention_weights(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  layer: int,
  mask: Mask | None = None,
) -> Float[Array, "B N T S"]:
  """Returns how much each token attends to each other one, in fp32.

  Args:
    model: a language model without time embedding.
    params: its parameters, which see the images (`with_images`).
    tokens: of prompts without padding, placeholders among them.
    layer: its number, from 0; negative ones count from the last.
    mask: of the tokens; causal by default.

  Returns:
    Of N heads, for T queries, over S = T keys; rows sum to 1.

  Raises:
    UserError: there is no such layer.
  """
  kinds = model.layer_kinds()
  if not -len(kinds) <= layer < len(kinds):
    raise UserError(
      f"attention_weights: found layer {layer}, expected one of {len(kinds)}"
    )
  layer %= len(kinds)
  params = weights.with_tokens(params, tokens)
  x = weights.take(params["embed"], tokens).astype(model.dtype)
  x = x * jnp.asarray(model.embed_scale, x.dtype)
  mask = Mask.causal() if mask is None else mask
  at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  if "rotary" in params:
    at = params["rotary"].of_row(x.shape[1])
  deeper = jnp.zeros((*x.shape[:2], 0, x.shape[2]), x.dtype)
  if "injected" in params:
    deeper = weights.take(params["injected"], tokens).astype(x.dtype)
  for number, own in enumerate(tree.layers(params)):
    block = kinds[number]
    if number == layer:
      return _weights(block, own, x, mask, at)
    x = _output(block, own, x, mask, at)
    if number < deeper.shape[2]:
      x = x + deeper[:, :, number]
  raise AssertionError("the stack has as many layers as its blocks")


@functools.partial(jax.jit, static_argnums=0)
def _output(block: Block, params, x, mask, at):
  positions, rotation = _places(block, x, at)
  return block.apply({"params": params}, x, positions, mask, rotation)[0]


@functools.partial(jax.jit, static_argnums=0)
def _weights(block: Block, params, x, mask, at):
  a = block.attention
  _, rotation = _places(block, x, at)
  if block.cross is not None:
    x = block.cross.apply({"params": params["cross"]}, x)
  if block.norm is not None:
    x = block.norm.apply({"params": params["attention_norm"]}, x)
  own = {"params": params["attention"]}
  q, k, _ = a.apply(own, x, rotation, method="heads_of")
  k = jnp.repeat(k, a.heads // a.kv_heads, axis=2)
  scale = a.head_dim**-0.5 if a.scale is None else a.scale
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
  if a.softcap is not None:
    scores = a.softcap * jnp.tanh(scores / a.softcap)
  length = x.shape[1]
  visible = a.own_mask(mask).visible(length, length)[:, None]
  return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def _places(block: Block, x, at):
  """Returns positions, and the rotation at `at`: of images, coordinates."""
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  a = block.attention
  if a.rope is None:
    return positions, None
  return positions, a.rope.tables(at, a.head_dim)


def over_images(
  row: Float[Any, "T"],
  tokens: Int[Any, "T"],
  image_token: int,
  plans: list[Plan],
) -> list[list[Float[np.ndarray, "h w"]]]:
  """Returns one token's attention on the grids of the prompt's images.

  Args:
    row: of `attention_weights`, of a head or a mean over heads.
    tokens: of the prompt.
    image_token: id of the placeholder.
    plans: of its images, in order.

  Returns:
    For each image its grids, in the order of the plan: (rows, columns) of soft
    tokens. Learned ends of rows are left out.

  Raises:
    UserError: the prompt has more or fewer placeholders than the plans say.
  """
  found = np.asarray(row)[np.asarray(tokens) == image_token]
  want = sum(plan.soft_tokens for plan in plans)
  if len(found) != want:
    raise UserError(
      f"over_images: found {len(found)} placeholders, expected {want}, as many"
      " as the images' plans have soft tokens"
    )
  out, start = [], 0
  for plan in plans:
    grids = []
    for number, (height, width) in enumerate(plan.grids):
      last = number == len(plan.grids) - 1
      # A learned vector ends each row of the last grid, where there are any.
      wide = width + (1 if last and plan.row_ends else 0)
      part = found[start : start + height * wide].reshape(height, wide)
      grids.append(part[:, :width])
      start += height * wide
    out.append(grids)
  return out
