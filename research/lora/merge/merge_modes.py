"""Three ways to merge adapters that were trained over a packed base.

An adapter over a base in few bits has learned to correct that base, rounding
errors included. So merged into it, decoded, it computes what was trained; into
the weights that the base was rounded from, it corrects errors that they do not
have; and what is packed again loses what falls between two codes, which of a
small update may be all of it (quantization.md 2.7). What each way changes is
measured in logits, beside the model that was trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from research import tree, weights
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import merging
from research.nn.transformer import Transformer
from research.quant.qtensor import QTensor
from research.quant.quantize import Quantize
from research.typing import Array, Int, Params, UserError

MODES = {
  "decoded": "the base, decoded, and its update: what was trained",
  "requantized": "the same, packed again in the base's format",
  "original": "the weights that the base was rounded from, and the update",
}


def merged(
  params: Params, mode: str, original: Params | None = None
) -> dict[str, Any]:
  """Returns a tree without adapters; what has none stays as it is.

  Args:
    params: adapters over packed matrices, or over any.
    mode: of `MODES`.
    original: for that mode, the tree before it was packed.

  Raises:
    UserError: there is no such mode, or the original is of another model.
  """
  if mode not in MODES:
    raise UserError(
      f"merging: mode is {mode!r}, expected one of {', '.join(MODES)}"
    )
  if mode == "decoded":
    return wrap.merge(params)
  if mode == "original":
    return wrap.merge(_rebased(params, original))

  def again(path: str, w: Any) -> Any:
    base = _base(w)
    if base is w or not weights.is_packed(base):
      return wrap.merge({path: w})[path]
    return _packed_as(base, wrap.merge({path: w})[path], path)

  scaled = wrap.merge_biases(params)
  return tree.map_paths(again, scaled, is_leaf=weights.is_weight)


def report(
  model: Transformer,
  params: Params,
  original: Params | None,
  tokens: Int[Array, "B T"],
) -> dict[str, merging.Outputs]:
  """Returns, for each mode, how its logits differ from the adapted model's.

  Args:
    model: of all trees.
    params, original: as in `merged`; that mode is left out without one.
    tokens: rows that are read.
  """
  return {
    mode: merging.outputs(model, params, merged(params, mode, original), tokens)
    for mode in MODES
    if mode != "original" or original is not None
  }


def _base(w: Any) -> Any:
  """Returns what stands below all adapters."""
  while isinstance(w, AdaptedTensor):
    w = w.w
  return w


def _packed_as(base: QTensor, dense: Array, where: str) -> QTensor:
  """Returns a matrix in the format of another one, rounded to nearest.

  Rows are in the base's order; those that it keeps apart in full precision are
  apart again, and 0 where the rest is packed, as `outlier_rows` has them.
  """
  stored = dense if base.axis == -2 else jnp.swapaxes(dense, -1, -2)
  order, outliers = base.order, base.outliers
  if outliers is not None:
    rows = jnp.asarray(outliers["rows"])
    values = jnp.take_along_axis(stored, rows[..., None], axis=-2)
    outliers = {"rows": rows, "values": values.astype(outliers["values"].dtype)}
    apart = (rows[..., None] == jnp.arange(base.inputs)).any(-2)
    stored = jnp.where(apart[..., None], 0, stored)
  if order is not None:
    places = jnp.argsort(jnp.asarray(order), axis=-1)
    stored = jnp.take_along_axis(stored, places[..., None], axis=-2)
  packed = Quantize(format=base.format).pack(stored, where)
  return dataclasses.replace(
    packed, axis=base.axis, order=order, outliers=outliers
  )


def _rebased(params: Params, original: Params | None) -> dict[str, Any]:
  """Returns adapters over the original's weights."""
  if original is None:
    raise UserError("merging: mode 'original' needs the unpacked tree too")
  found = _leaves(original)

  def one(path: str, w: Any) -> Any:
    if not isinstance(w, AdaptedTensor):
      return w
    like = found.get(path)
    if like is None or like.shape != w.shape:
      has = "nothing" if like is None else f"a weight {list(like.shape)}"
      raise UserError(
        f"merging: {path} is {list(w.shape)}; the original has {has} there, "
        "expected the tree that was packed"
      )
    return _over(w, like)

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def _over(w: Any, base: Any) -> Any:
  if not isinstance(w, AdaptedTensor):
    return base
  return w.map_base(lambda below: _over(below, base))


def _leaves(params: Params) -> Mapping[str, Any]:
  return dict(weights.named_weights(params))
