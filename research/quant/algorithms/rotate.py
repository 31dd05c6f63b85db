"""Rotations that leave a model's outputs and spread its outliers.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024,
arXiv:2405.16406). RMSNorm without a gain commutes with rotations, so, norms
folded, the whole residual stream may be rotated by one orthogonal matrix R1,
hidden inside the weights; each value head by an R2; and hidden units of the
feed-forward by a Hadamard matrix, which alone is applied as the model runs,
fast. Rotated activations have no outliers, and so few bits serve them.

All is computed in float64 and cast at the end. The head of a model with tied
embeddings is no longer the embedding: `research.quant.untied_embedding` is both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn.transformer import Transformer
from research.quant.activations import InputTensor, Op
from research.quant.algorithms import folding
from research.quant.algorithms.folding import Flat
from research.quant.numerics import hadamard
from research.quant.untied_embedding import Untied
from research.typing import (
  Array,
  Float,
  Params,
  PRNGKey,
  UserError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard(Op):
  """The op that rotates inputs by `hadamard.rotate`; its weight is rotated."""

  def __call__(self, x: Float[Array, "..."], scale: Any = None) -> Any:
    """Returns `x` rotated along its last axis."""
    del scale
    return hadamard.rotate(x)

  def undone(self, w: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """Returns the matrix before it was rotated."""
    turned = hadamard.rotate(jnp.swapaxes(w, -1, -2), inverse=True)
    return jnp.swapaxes(turned, -1, -2)


def rotate_inputs(w: Float[Array, "*L I O"]) -> InputTensor:
  """Returns a weight of the same products, whose inputs are rotated."""
  turned = hadamard.rotate(jnp.swapaxes(w, -1, -2))
  return InputTensor(jnp.swapaxes(turned, -1, -2), op=Hadamard())


def fold_norms(model: Transformer, params: Params) -> dict[str, Any]:
  """Returns the same model with norms of gain 1 before layers and head.

  Raises:
    UserError: the model's outputs are normalised, too (Gemma 2 and 3).
  """

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    if block.post_norm is not None:
      raise UserError(
        f"{where}: outputs are normalised with gains, which no rotation"
        " passes.\nGemma 2 and 3 have no rotated residual stream."
      )
    out = dict(flat)
    for norm in folding.READERS:
      stored = flat[f"{norm}/scale"]
      out[f"{norm}/scale"] = jnp.ones_like(stored) - block.norm.offset
      for path in folding.readers(flat, norm):
        gain = block.norm.offset + stored
        out[path] = folding.scale_rows(flat[path], gain, path)
    return out

  out = folding.map_layers(layer, model, params)
  offset = model.norm.offset
  stored = params["final_norm"]["scale"]
  gain = offset + stored
  out["final_norm"] = {"scale": jnp.ones_like(stored) - offset}
  if model.tied:
    table = folding.array(params["embed"], "embed")
    out["embed"] = Untied(table, (gain * table).astype(table.dtype))
  else:
    out["head"] = folding.scale_rows(params["head"], gain, "head")
  return out


def rotate_residual(
  model: Transformer, params: Params, r: Float[Array, "D D"]
) -> dict[str, Any]:
  """Returns the same model, folded, its residual stream times `r`.

  Args:
    model: with norms of gain 1, see `fold_norms`.
    params: its parameters.
    r: orthogonal.
  """

  def rows(w):
    return jnp.matmul(r.T, w).astype(w.dtype)

  def columns(w):
    return jnp.matmul(w, r).astype(w.dtype)

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    out = dict(flat)
    for norm in folding.READERS:
      for path in folding.readers(flat, norm):
        out[path] = rows(flat[path])
    for path in folding.WRITERS:
      for name in (path, f"{path}_bias"):
        if name in flat:
          out[name] = weights.within(flat[name], columns)
    return out

  out = folding.map_layers(layer, model, params)
  embed = params["embed"]
  if isinstance(embed, Untied):
    out["embed"] = Untied(columns(embed.table), columns(embed.head))
  else:
    out["embed"] = columns(embed)
  if "head" in params:
    out["head"] = rows(params["head"])
  return out


def rotate_values(
  model: Transformer, params: Params, r: Float[Array, "H H"]
) -> dict[str, Any]:
  """Returns the same model, each value head times `r`, which `o` undoes."""

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    size = block.attention.head_dim
    out = dict(flat)
    for name in ("attention/v", "attention/v_bias"):
      if name in flat:
        w = flat[name]
        heads = w.reshape(*w.shape[:-1], -1, size)
        out[name] = jnp.matmul(heads, r).reshape(w.shape).astype(w.dtype)
    o = flat["attention/o"]
    heads = o.reshape(*o.shape[:-2], -1, size, o.shape[-1])
    out["attention/o"] = jnp.matmul(r.T, heads).reshape(o.shape).astype(o.dtype)
    return out

  return folding.map_layers(layer, model, params)


def rotate_hidden(model: Transformer, params: Params) -> dict[str, Any]:
  """Returns the same model whose `down` rotates what it is given, fast."""

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    found = [f"{mlp}/down" for mlp in folding.MLPS if f"{mlp}/down" in flat]
    return flat | {path: rotate_inputs(flat[path]) for path in found}

  return folding.map_layers(layer, model, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate:
  """QuaRot's rotations by random Hadamard matrices, as a transform.

  What QuaRot rotates after the rotary embedding, queries and keys, concerns a
  cache of keys alone, which has its own rotation (`kv.kv_cache`).

  Attributes:
    residual: R1; `values`: R2; `hidden`: of `down`'s inputs, as the model runs.
    model: whose weights these are, given by `of`.
  """

  residual: bool = True
  values: bool = True
  hidden: bool = True
  model: Any = None

  def of(self, loaded: Any) -> "Rotate":
    """Returns itself for `loaded.model`."""
    return dataclasses.replace(self, model=loaded.model)

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` rotated; norms are folded, the head is untied.

    Raises:
      UserError: no model yet, or one that cannot be rotated.
    """
    if self.model is None:
      raise UserError("Rotate: has no model; `of` gives it one.")
    first, second = jax.random.split(key)
    residual = values = None
    if self.residual:
      residual = hadamard.random_matrix(first, self.model.width)
    if self.values:
      values = hadamard.random_matrix(second, head_dim(self.model))
    return rotated(self.model, params, residual, values, self.hidden)


def rotated(
  model: Transformer,
  params: Params,
  residual: Float[Array, "D D"] | None,
  values: Float[Array, "H H"] | None,
  hidden: bool,
) -> dict[str, Any]:
  """Returns the same model rotated, computed in float64.

  Args:
    model: what `params` are for.
    params: its parameters; norms are folded if `residual` is given.
    residual: R1, orthogonal to about fp32's precision, or None.
    values: R2, the same way.
    hidden: whether `down` rotates its inputs.
  """
  with jax.enable_x64(True):
    out = folding.widened(params)
    if residual is not None:
      out = fold_norms(model, out)
      out = rotate_residual(model, out, nearest_rotation(residual))
    if values is not None:
      out = rotate_values(model, out, nearest_rotation(values))
    if hidden:
      out = rotate_hidden(model, out)
    return folding.cast_like(out, params)


def nearest_rotation(r: Float[Array, "D D"]) -> Float[Array, "D D"]:
  """Returns the orthogonal matrix next to one that nearly is, in float64."""
  r = jnp.asarray(r, jnp.float64)
  for _ in range(3):  # Newton's iteration for the polar factor
    r = 1.5 * r - 0.5 * r @ r.T @ r
  return r


def head_dim(model: Transformer) -> int:
  """Returns the size of all layers' heads.

  Raises:
    UserError: they differ.
  """
  found = {block.attention.head_dim for block in model.layer_kinds()}
  if len(found) != 1:
    raise UserError(f"Rotate.values: found heads of {sorted(found)}, not one.")
  return found.pop()
