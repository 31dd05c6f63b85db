"""Merging adapters into their base, which tells what it loses.

In bf16 most of a small update falls between two numbers and is rounded away
(research/lora/MATH.md 2.4). Here sums are formed in fp32 and rounded to
nearest, or stochastically, which keeps the update on average; what is kept is
measured, and a merge that would lose too much is refused.

An adapter over a base in few bits has learned to correct that base, rounding
errors included, so there are three ways to merge it (`MODES`). Merged into the
base, decoded, it computes what was trained; into the weights that the base was
rounded from, it corrects errors that they do not have; and what is packed again
loses what falls between two codes, which of a small update may be all of it
(research/quant/MATH.md 2). What each way changes is measured in logits, beside
the model that was trained.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from research import tree, weights
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import changes
from research.nn.transformer import Transformer
from research.quant.activations import InputTensor
from research.quant.qtensor import QTensor
from research.quant.quantize import Quantize
from research.typing import Array, Float, Int, Params, UserError

MODES = {
  "decoded": "the base, decoded, and its update: what was trained",
  "requantized": "the same, packed again in the base's format",
  "original": "the weights that the base was rounded from, and the update",
}


@dataclasses.dataclass(frozen=True)
class StochasticRounding:
  """Rounds up or down with the chances that make the mean exact.

  Attributes:
    seed: each weight draws by it and its own name.
  """

  seed: int = 0

  def __call__(
    self, name: str, x: Shaped[np.ndarray, "..."], dtype: np.dtype
  ) -> Shaped[np.ndarray, "..."]:
    near = changes.cast(name, x, dtype)
    if near is x:
      return x
    error = x - near.astype(np.float32)
    ends = np.where(error > 0, np.inf, -np.inf).astype(dtype)
    with np.errstate(over="ignore"):
      far = np.nextafter(near, ends)
    gap = np.abs(far.astype(np.float32) - near.astype(np.float32))
    rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
    # Beyond the largest number of a type the gap is not finite: stay.
    other = rng.random(x.shape, np.float32) * gap < np.abs(error)
    return np.where(other & np.isfinite(gap), far, near)


def merge(
  params: Params,
  rounding: changes.Rounding = changes.cast,
  dtype: str | None = None,
  least: float | None = None,
) -> tuple[dict[str, Any], dict[str, changes.Change]]:
  """Returns the tree with adapters merged, and what each of them lost.

  Args:
    params: with adapters, on any base.
    rounding: `changes.cast`, to nearest, or `StochasticRounding`.
    dtype: dtype of merged weights; None for each base's own.
    least: share of all updates that has to be kept; None for whatever it is.

  Raises:
    UserError: less is kept, or an adapter is inside another weight.
  """
  _check_outermost(params)
  losses: dict[str, changes.Change] = {}
  indices, scaled = tree.layer_indices(params), wrap.biases(params)

  def leaf(path, weight):
    total_and_base = changes.in_float32(scaled.get(path, weight))
    if total_and_base is None:
      return weight
    total, base = total_and_base
    kind = np.dtype(jnp.dtype(dtype or weight.dtype))
    prefix, _, inner = path.partition("/layer")
    if prefix == path:  # outside of the layers
      out, losses[path] = _rounded(path, total, base, kind, rounding)
      return jnp.asarray(out)
    layer, _, inner = inner.partition("/")
    rows = []
    for k, i in enumerate(indices[f"{prefix}/layer{layer}"]):
      name = f"layers/{i}/{inner}"
      row, losses[name] = _rounded(name, total[k], base[k], kind, rounding)
      rows.append(row)
    return jnp.asarray(np.stack(rows))

  out = tree.map_paths(leaf, params, is_leaf=weights.is_weight)
  if least is not None:
    changes.check_kept(losses.values(), least)
  return out, losses


def _rounded(name, total, base, dtype, rounding):
  got, alone = (rounding(name, x, dtype) for x in (total, base))
  comparison = changes.Comparison()
  comparison.add(total, *(x.astype(np.float32) for x in (got, base, alone)))
  return got, comparison.change(name, "float32", str(dtype))


@dataclasses.dataclass(frozen=True)
class LogitChange:
  """How the outputs of two models differ on some tokens.

  Attributes:
    max_logit, mean_logit: largest and mean absolute change of a logit.
    kl: mean Kullback-Leibler divergence of the second from the first, in nats
      a token.
    max_kl: the largest of a token.
    agreement: share of tokens after which both expect the same.
  """

  max_logit: float
  mean_logit: float
  kl: float
  max_kl: float
  agreement: float
  tokens: int


def logit_change(
  model: Transformer, before: Params, after: Params, tokens: Int[Array, "B T"]
) -> LogitChange:
  """Returns how logits change from one tree to another, both of `model`."""
  rows = [
    jax.tree.map(np.asarray, _compared(model, before, after, row[None]))
    for row in tokens
  ]
  worst, mean, kl, max_kl, same = (np.array(x) for x in zip(*rows, strict=True))
  return LogitChange(
    max_logit=float(worst.max()),
    mean_logit=float(mean.mean()),
    kl=float(kl.mean()),
    max_kl=float(max_kl.max()),
    agreement=float(same.mean()),
    tokens=int(tokens.size),
  )


@functools.partial(jax.jit, static_argnums=0)
def _compared(model, before, after, tokens):
  def logits(params) -> Float[Array, "B T V"]:
    hidden, _ = model.apply({"params": params}, tokens)
    out = model.apply({"params": params}, hidden, method="logits")
    return out.astype(jnp.float32)

  x, y = logits(before), logits(after)
  p, q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  change = jnp.abs(x - y)
  same = jnp.mean(x.argmax(-1) == y.argmax(-1))
  return change.max(), change.mean(), kl.mean(), kl.max(), same


def merge_as(
  params: Params, mode: str, original: Params | None = None
) -> dict[str, Any]:
  """Returns a tree without adapters; what has none stays as it is.

  Args:
    params: adapters over packed matrices, or over any.
    mode: one of `MODES`.
    original: for that mode, the tree before it was packed.

  Raises:
    UserError: there is no such mode, or the original is of another model, or
      what was packed is that model rotated or scaled, or without the update, or
      an adapter is inside another weight.
  """
  if mode not in MODES:
    raise UserError(
      f"merging: mode is {mode!r}, expected one of {', '.join(MODES)}"
    )
  if mode == "decoded":
    return wrap.merge(params)
  _check_outermost(params)
  if mode == "original":
    return wrap.merge(_rebased(params, original))

  def again(path: str, w: Any) -> Any:
    base = _base(w)
    merged = wrap.merge({path: w})[path]
    if base is w or not weights.is_packed(weights.inner(base)):
      return merged
    return _packed_like(base, merged, path)

  scaled = wrap.merge_biases(params)
  return tree.map_paths(again, scaled, is_leaf=weights.is_weight)


def report_modes(
  model: Transformer,
  params: Params,
  original: Params | None,
  tokens: Int[Array, "B T"],
) -> dict[str, LogitChange]:
  """Returns, for each mode, how its logits differ from the adapted model's.

  Args:
    params, original: as in `merge_as`; that mode is left out without one.
  """
  return {
    mode: logit_change(model, params, merge_as(params, mode, original), tokens)
    for mode in MODES
    if mode != "original" or original is not None
  }


def _check_outermost(params: Params) -> None:
  for _ in wrap.adapted(params):
    pass


def _base(w: Any) -> Any:
  while isinstance(w, AdaptedTensor):
    w = w.w
  return w


def _packed_like(base: Any, dense: Array, where: str) -> Any:
  """Returns a matrix with the base's operations on inputs, in its format."""
  inside = jnp.asarray(dense, jnp.promote_types(dense.dtype, jnp.float32))
  below = base
  while isinstance(below, InputTensor):
    inside, below = below.op.stored_weight(inside), below.w
  inside = inside.astype(dense.dtype)
  packed = _packed_as(weights.inner(below), inside, where)
  return weights.map_inner(base, lambda _: packed)


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
  originals = _leaves(original)

  def one(path: str, w: Any) -> Any:
    if not isinstance(w, AdaptedTensor):
      return w
    like = originals.get(path)
    if like is None or like.shape != w.shape:
      has = "nothing" if like is None else f"a weight {list(like.shape)}"
      raise UserError(
        f"merging: {path} is {list(w.shape)}; the original has {has} there, "
        "expected the tree that was packed"
      )
    _check_counted_once(path, w, like)
    _check_rounded(path, _base(w), like)
    return _over(w, like)

  return tree.map_paths(one, params, is_leaf=weights.is_weight)


def _check_rounded(path: str, base: Any, original: Any) -> None:
  """Raises UserError unless the base may be the original's weight, rounded.

  Errors of rounding are hardly correlated with the weights, so a regression of
  each input's row of the base on the original's has about the same coefficient
  for all inputs. Rotated rows have 0, and scaled ones their scales.
  """
  inside = weights.inner(base)
  axis = -2 if weights.is_packed(inside) and inside.axis == -1 else -1
  mean, spread = (np.asarray(x) for x in _gains(base, original, axis))
  # Rows that are all 0 have no coefficient: NaN, which is no error.
  if (far := mean[(mean < 0.5) | (mean > 2)]).size:
    reason = f"a regression on it has the coefficient {far[0]:.2f}"
  elif (spread > 0.1).any():
    reason = (
      f"half of its inputs have another scale, by over {spread.max():.0%}"
    )
  else:
    return
  raise UserError(
    f"merging: {path} was not rounded from the original's weight: {reason}; "
    "expected the tree that was packed.\nRotations (Rotate, SpinQuant) and "
    "scales (AWQ, SmoothQuant) change the base before it is packed, and the "
    "original has to be changed alike. Take mode 'decoded' or 'requantized', "
    "without an original."
  )


def _check_counted_once(path: str, adapted: Any, original: Any) -> None:
  """Raises UserError if the update has what was taken out of the base.

  QPiSSA packs a base without the product of its first factors, and LoftQ fits
  factors to the rounding errors: in both the base's distance from the original
  has the update in it, with a coefficient of 1 before training. Rounding errors
  alone have 0, up to their root mean square over the update's norm.
  """
  gain, noise = map(np.asarray, _in_distance(adapted, original))
  if not (counted := gain[(gain > 0.3) & (noise < 0.05)]).size:
    return
  raise UserError(
    f"merging: {path} would have its update twice: the original has "
    f"{counted.max():.0%} of it already, since the base was packed without it, "
    "or it was fitted to the base's rounding errors (QPiSSA, LoftQ).\nTake "
    "mode 'decoded' or 'requantized', without an original."
  )


@jax.jit
def _in_distance(adapted, original):
  """Returns each matrix's (coefficient of the update, its standard error)."""
  start, end, y = (
    weights.dense(w).astype(jnp.float32)
    for w in (_base(adapted), adapted, original)
  )
  sums = functools.partial(jnp.sum, axis=(-2, -1))
  # Without what a coarse base has too little of the original itself.
  along = sums((y - start) * y) / sums(y * y)
  rest, update = y - start - along[..., None, None] * y, end - start
  size = sums(update * update)
  mean_square = jnp.mean(rest * rest, axis=(-2, -1))
  return sums(rest * update) / size, jnp.sqrt(mean_square / size)


@functools.partial(jax.jit, static_argnums=2)
def _gains(base, original, axis):
  """Returns (coefficient, median deviation of the inputs') of each matrix."""
  x, y = (weights.dense(w).astype(jnp.float32) for w in (base, original))
  along, squares = (x * y).sum(axis), (y * y).sum(axis)
  mean = along.sum(-1) / squares.sum(-1)
  each = jnp.where(squares > 0, along / squares, jnp.nan) / mean[..., None]
  return mean, jnp.nanmedian(jnp.abs(each - 1), axis=-1)


def _over(w: Any, base: Any) -> Any:
  if not isinstance(w, AdaptedTensor):
    return base
  return w.map_base(lambda below: _over(below, base))


def _leaves(params: Params) -> Mapping[str, Any]:
  return dict(weights.named_weights(params))
