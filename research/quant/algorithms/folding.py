"""Function-preserving changes of a layer: moves scales between its weights.

A layer is a flat dict here: path within the layer (`attention/q`) -> weight,
with any leading axes (a run's layers). Matrices become dense arrays.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from research import tree, weights
from research.nn.transformer import Transformer
from research.typing import Array, Float, Params, UserError

Flat = dict[str, Any]
"""Path within a layer -> weight."""

READERS = {
  "attention_norm": ("attention/q", "attention/k", "attention/v"),
  "mlp_norm": (
    "mlp/gate",
    "mlp/up",
    "mlp/router",
    "mlp/experts/gate",
    "mlp/experts/up",
    "mlp/shared/gate",
    "mlp/shared/up",
  ),
}
"""Norm -> the matrices that multiply its output."""

WRITERS = ("attention/o", "mlp/down", "mlp/experts/down", "mlp/shared/down")
"""Matrices whose outputs, with their biases, are added to the residual."""

MLPS = ("mlp", "mlp/experts", "mlp/shared")
"""Feed-forward modules that a layer may have."""


def readers(flat: Flat, norm: str) -> list[str]:
  """Returns the paths of the layer's matrices that multiply `norm`'s output."""
  return [path for path in READERS[norm] if path in flat]


def dense_array(w: Any, where: str) -> Array:
  """Returns a weight as a dense array, to be changed.

  Raises:
    UserError: the weight is adapted, or its inputs are transformed.
  """
  if weights.unwrap(w) is not None:
    raise UserError(
      f"{where}: is adapted, or its inputs are transformed, already.\nFold,"
      " scale and rotate first."
    )
  return weights.dense(w)


def to_float64(params: Params) -> Any:
  """Returns `params` as float64 arrays; requires JAX's x64 mode.

  Raises:
    UserError: a weight is adapted, or its inputs are transformed.
  """

  def one(path: str, w: Any) -> Any:
    w = dense_array(w, path)
    floating = jnp.issubdtype(w.dtype, jnp.floating)
    return w.astype(jnp.float64) if floating else w

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def cast_like(tree_of: Any, params: Params) -> Any:
  """Returns a tree of float64 arrays, cast to the dtypes of `params`.

  Args:
    tree_of: a tree like `params`; a weight may have become several arrays.
  """
  dtypes = {path: w.dtype for path, w in weights.named_weights(params)}

  def one(path: str, x: Any) -> Any:
    while path not in dtypes:
      path = path.rpartition("/")[0]
    return x.astype(dtypes[path])

  return tree.map_paths(one, tree_of)


def map_layers(
  f: Callable[[Flat, Any, str], Flat], model: Transformer, params: Params
) -> dict[str, Any]:
  """Applies `f(layer, block, path)` to each run's stacked layers.

  Args:
    f: receives layers stacked along a leading axis, their module, and their
      path for error messages; returns the new layers.
  """
  out = tree.outer_params(params)
  for name, _, blocks in model.stack.runs(params):
    out[name] = {}
    for j, block in enumerate(blocks):
      flat = traverse_util.flatten_dict(params[name][f"layer{j}"], sep="/")
      found = f(flat, block, f"{name}/layer{j}")
      out[name][f"layer{j}"] = traverse_util.unflatten_dict(found, sep="/")
  return out


def scale_norm(
  flat: Flat, norm: str, s: Float[Array, "*L D"], offset: float
) -> Flat:
  """Divides a norm's output by `s`; multiplies its readers to compensate.

  Args:
    norm: `attention_norm` or `mlp_norm`.
    offset: the norm's offset of its gain, 1 for Gemma.
  """
  path = f"{norm}/scale"
  gain = (offset + flat[path]) / s - offset
  out = flat | {path: gain.astype(flat[path].dtype)}
  return out | {p: scale_rows(flat[p], s, p) for p in readers(flat, norm)}


def scale_rows(w: Any, s: Float[Array, "*L I"], where: str) -> Array:
  """Returns `diag(s) w`; experts `[..., E, I, O]` share `s [..., I]`."""
  w = dense_array(w, where)
  while s.ndim < w.ndim - 1:
    s = s[..., None, :]
  return (s[..., None] * w).astype(w.dtype)


def scale_values(
  flat: Flat, s: Float[Array, "*L X"], heads: int, kv_heads: int
) -> Flat:
  """Divides the values by `s`; multiplies `o` to compensate.

  Args:
    s: scale of each output `[..., K H]` of `v`; query heads that share a value
      head share its scales.
  """
  v, o = (dense_array(flat[f"attention/{name}"], name) for name in "vo")
  out = {"attention/v": (v / s[..., None, :]).astype(v.dtype)}
  if "attention/v_bias" in flat:
    bias = flat["attention/v_bias"]
    out["attention/v_bias"] = (bias / s).astype(bias.dtype)
  shared = to_heads(s, heads, kv_heads)
  out["attention/o"] = (shared[..., None] * o).astype(o.dtype)
  return flat | out


def to_heads(
  s: Float[Array, "*L X"], heads: int, kv_heads: int
) -> Float[Array, "*L Y"]:
  """Repeats value heads' numbers `[..., K H]` for query heads, `[..., N H]`."""
  apart = s.reshape(*s.shape[:-1], kv_heads, -1)
  found = jnp.repeat(apart, heads // kv_heads, axis=-2)
  return found.reshape(*s.shape[:-1], -1)


def from_heads(
  s: Float[Array, "*L Y"], heads: int, kv_heads: int
) -> Float[Array, "*L X"]:
  """Returns geometric means over query heads that share a value head.

  The result is `[..., K H]`.
  """
  apart = s.reshape(*s.shape[:-1], kv_heads, heads // kv_heads, -1)
  found = jnp.exp(jnp.mean(jnp.log(apart), axis=-2))
  return found.reshape(*s.shape[:-1], -1)


def scale_hidden(flat: Flat, mlp: str, s: Float[Array, "*L F"]) -> Flat:
  """Divides the hidden units by `s`; multiplies `down` to compensate.

  Args:
    mlp: one of `MLPS`.
    s: positive scales; `[..., E, F]` for experts.
  """
  up, down = (
    dense_array(flat[f"{mlp}/{name}"], name) for name in ("up", "down")
  )
  out = {
    f"{mlp}/up": (up / s[..., None, :]).astype(up.dtype),
    f"{mlp}/down": (s[..., None] * down).astype(down.dtype),
  }
  if f"{mlp}/up_bias" in flat:
    bias = flat[f"{mlp}/up_bias"]
    out[f"{mlp}/up_bias"] = (bias / s).astype(bias.dtype)
  return flat | out
