"""Attention error of KV cache quantization, per layer.

Uses queries, keys and values of the unquantized model, after the rotary
embedding, so that layers' errors do not accumulate. All tokens are packed,
recent ones too.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import tree, weights
from research.nn.attention_context import attend
from research.nn.block import Block
from research.nn.transformer import Transformer
from research.quant.kv.kv_quantizer import KVQuantizer
from research.typing import Array, Float, Int, Params, UserError


def attention_errors(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  kvs: Sequence[KVQuantizer],
) -> np.ndarray:
  """Returns `|o' - o| / |o|` of attention's outputs, `[layers, kvs]`.

  Args:
    tokens: token ids; T is a multiple of every group of tokens.

  Raises:
    UserError: T is no such multiple.
  """
  for kv in kvs:
    if tokens.shape[1] % kv.group and any(g.packs_blocks for g in kv.grids):
      raise UserError(
        f"tokens: found rows of {tokens.shape[1]}, expected a multiple of the "
        f"group of {kv.group}"
      )
  x = weights.take(params["embed"], tokens).astype(model.dtype)
  x = x * jnp.asarray(model.embed_scale, x.dtype)
  out = []
  for block, layer in zip(
    model.layer_kinds(), tree.layers(params), strict=True
  ):
    x, errors = _layer(block, layer, x, tuple(kvs))
    out.append(errors)
  return np.asarray(out)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _layer(
  block: Block,
  params: Params,
  x: Float[Array, "B T D"],
  kvs: tuple[KVQuantizer, ...],
) -> tuple[Float[Array, "B T D"], Float[Array, " E"]]:
  a = block.attention
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  rotation = None
  if a.rope is not None:
    rotation = a.rope.tables(positions, a.head_dim)
  normed = x
  if block.norm is not None:
    own = {"params": params["attention_norm"]}
    normed = block.norm.apply(own, x)
  own = {"params": params["attention"]}
  q, k, v = a.apply(own, normed, rotation, method="heads_of")
  window = None if a.window is None else (a.window - 1, None)

  def attended(k, v):
    mask = Mask.causal(window)
    return attend(q, k, v, mask=mask, scale=a.scale, softcap=a.softcap)

  want = attended(k, v)

  def error(kv):
    keys, values = (
      grid.decode(grid.encode(y.swapaxes(1, 2))).swapaxes(1, 2).astype(y.dtype)
      for y, grid in zip((k, v), kv.grids, strict=True)
    )
    apart = attended(keys, values) - want
    return jnp.linalg.norm(apart) / jnp.linalg.norm(want)

  x, *_ = block.apply({"params": params}, x, positions, Mask.causal(), rotation)
  return x, jnp.stack([error(kv) for kv in kvs])
