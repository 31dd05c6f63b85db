"""QuaRot: rotations that remove activation outliers and preserve outputs.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024,
arXiv:2405.16406). RMSNorm without a gain commutes with rotations. With norms
folded, the residual stream is rotated by an orthogonal matrix R1 and each value
head by R2, both merged into the weights. The feed-forward's hidden units are
rotated by a Hadamard matrix, the only rotation at run time, by a fast
transform. Rotated activations have no outliers, so few bits suffice.

Everything is computed in float64 and cast at the end. The head of a model with
tied embeddings then differs from the embedding:
`research.quant.untied_embedding` holds both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.nn.norm import Norm
from research.nn.transformer import Transformer
from research.quant import untied_embedding
from research.quant.activations import InputTensor, Op
from research.quant.algorithms import folding
from research.quant.algorithms.folding import Flat
from research.quant.numerics import hadamard
from research.quant.untied_embedding import Untied
from research.typing import (
  Array,
  Float,
  Int,
  Params,
  PRNGKey,
  UserError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard(Op):
  """Op that rotates inputs by `hadamard.rotate`; its weight is rotated, too."""

  def __call__(self, x: Float[Array, "..."], scale: Any = None) -> Any:
    del scale
    return hadamard.rotate(x)

  def take(self, w: Any, ids: Int[Array, "..."]) -> Float[Array, "... O"]:
    """Returns rows of the effective matrix, each a sum of many stored ones."""
    return jnp.take(self.effective_weight(weights.dense(w)), ids, axis=0)

  def effective_weight(
    self, w: Float[Array, "*L I O"]
  ) -> Float[Array, "*L I O"]:
    return _rotated_rows(w, inverse=True)

  def stored_weight(self, w: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    return _rotated_rows(w)


def _rotated_rows(
  w: Float[Array, "*L I O"], inverse: bool = False
) -> Float[Array, "*L I O"]:
  """Returns `hadamard.rotate` of a matrix along its inputs."""
  turned = hadamard.rotate(jnp.swapaxes(w, -1, -2), inverse=inverse)
  return jnp.swapaxes(turned, -1, -2)


def rotate_inputs(w: Float[Array, "*L I O"]) -> InputTensor:
  """Returns an equivalent weight that rotates its inputs."""
  op = Hadamard()
  return InputTensor(op.stored_weight(w), op=op)


def fold_norms(model: Transformer, params: Params) -> dict[str, Any]:
  """Folds norms' gains into the following matrices; the model is unchanged.

  Raises:
    UserError: blocks also normalise their outputs (Gemma 2 and 3), add a shift
      after a norm (AdaLN), or attend to images before a layer.
  """

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    if block.modulation is not None or block.cross is not None:
      found = "adaptive layer norm" if block.modulation else "cross-attention"
      raise UserError(
        f"{where}: found {found}, whose weights also depend on the basis of the"
        " residual stream and are not rotated.\nExpected layers of attention"
        " and feed-forward alone, or residual=False."
      )
    if block.post_norm is not None:
      raise UserError(
        f"{where}: found a norm with a gain on outputs, which does not commute"
        " with rotations.\nThe residual stream of Gemma 2 and 3 cannot be"
        " rotated."
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
    table = folding.dense_array(params["embed"], "embed")
    out["embed"] = Untied(table, (gain * table).astype(table.dtype))
  else:
    out["head"] = folding.scale_rows(params["head"], gain, "head")
  return out


def rotate_residual(
  model: Transformer, params: Params, r: Float[Array, "D D"]
) -> dict[str, Any]:
  """Rotates the residual stream by `r`; the model's outputs are unchanged.

  Args:
    params: its parameters, with norms of gain 1, see `fold_norms`.
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
          out[name] = weights.map_inner(flat[name], columns)
    return out

  out = folding.map_layers(layer, model, params)
  out["embed"] = untied_embedding.map_matrices(columns, params["embed"])
  if "head" in params:
    out["head"] = rows(params["head"])
  return out


def rotate_values(
  model: Transformer, params: Params, r: Float[Array, "H H"]
) -> dict[str, Any]:
  """Rotates each value head by `r` and `o` by its inverse.

  Raises:
    UserError: values are keys before their norm, or their norm has a gain.
  """

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    a = block.attention
    if a.values == "keys" or isinstance(a.v_norm, Norm):
      raise UserError(
        f"{where}: found values that are keys, or a norm of values with a gain,"
        " which does not commute with rotations.\nExpected values=False."
      )
    size = a.head_dim
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
  """Rotates the inputs of `down` at run time by a fast Hadamard transform."""

  def layer(flat: Flat, block: Any, where: str) -> Flat:
    found = [f"{mlp}/down" for mlp in folding.MLPS if f"{mlp}/down" in flat]
    return flat | {path: rotate_inputs(flat[path]) for path in found}

  return folding.map_layers(layer, model, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate:
  """Transform that applies QuaRot's rotations, by random Hadamard matrices.

  QuaRot's rotation of queries and keys after the rotary embedding serves the
  key cache alone, which has its own rotation (`kv.kv_cache`).

  Attributes:
    residual: whether to rotate the residual stream (R1).
    values: whether to rotate value heads (R2).
    hidden: whether to rotate the inputs of `down` at run time.
  """

  residual: bool = True
  values: bool = True
  hidden: bool = True
  model: Any = None

  @property
  def rotates_residual(self) -> bool:
    return self.residual

  def with_model(self, loaded: Any) -> "Rotate":
    return dataclasses.replace(self, model=loaded.model)

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns `params` rotated; norms are folded, the head is untied.

    Raises:
      UserError: no model is set, or it cannot be rotated.
    """
    if self.model is None:
      raise UserError("Rotate: has no model; `with_model` sets it.")
    first, second = jax.random.split(key)
    residual = values = None
    if self.residual:
      residual = hadamard.random_matrix(first, self.model.width)
    if self.values:
      values = hadamard.random_matrix(second, head_dim(self.model))
    return rotate_model(self.model, params, residual, values, self.hidden)


def rotate_model(
  model: Transformer,
  params: Params,
  residual: Float[Array, "D D"] | None,
  values: Float[Array, "H H"] | None,
  hidden: bool,
) -> dict[str, Any]:
  """Returns the parameters of the rotated model, computed in float64.

  Args:
    params: its parameters; norms are folded if `residual` is given.
    residual: R1, orthogonal up to fp32 rounding, or None.
    values: R2, likewise.
  """
  with jax.enable_x64(True):
    out = folding.to_float64(params)
    if residual is not None:
      out = fold_norms(model, out)
      out = rotate_residual(model, out, nearest_rotation(residual))
    if values is not None:
      out = rotate_values(model, out, nearest_rotation(values))
    if hidden:
      out = rotate_hidden(model, out)
    return folding.cast_like(out, params)


def nearest_rotation(r: Float[Array, "D D"]) -> Float[Array, "D D"]:
  """Returns the orthogonal matrix nearest to an almost orthogonal one, fp64."""
  r = jnp.asarray(r, jnp.float64)
  for _ in range(3):  # Newton's iteration for the polar factor
    r = 1.5 * r - 0.5 * r @ r.T @ r
  return r


def head_dim(model: Transformer) -> int:
  """Returns the head size of all layers.

  Raises:
    UserError: layers have different head sizes.
  """
  found = {block.attention.head_dim for block in model.layer_kinds()}
  if len(found) != 1:
    raise UserError(f"Rotate.values: found heads of {sorted(found)}, not one.")
  return found.pop()
