"""Collects activation and gradient statistics of all weights in one `vjp`.

A `Tap` wraps a weight and multiplies like it. It carries an array `stat` of
zeros on which the product does not depend. A custom VJP defines the cotangent
of `stat` as a statistic of this product's rows, such as the covariance of the
inputs. So one `vjp` of an unchanged model yields the statistics of every layer,
through scanned and rematerialised stacks, under a mesh, and for any weight:

  loss(params with taps) -> cotangents of all `stat` = statistics of all layers

If a statistic does not need gradients, XLA removes the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import sharding, tree, weights
from research.taps.statistics import Rows, Statistic
from research.typing import (
  Array,
  Float,
  Int,
  Params,
  Shaped,
  UserError,
)

Statistics = Mapping[str, Mapping[str, Any]]
"""Path of a weight -> arrays of its statistic, stacked like the weight."""

_STAT = r"(^|/)stat/\w+$"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap(weights.WrappedWeight):
  """Wraps a weight `[..., in, out]` to collect a statistic of its inputs.

  Attributes:
    w: any weight.
    stat: zeros, one array `[..., *shape]` for each array of the statistic.
    counts: weight of each token, `[layers, B, T]`, or None for 1.
    statistic: the statistic to collect; static.
    sizes: (in, out) of the whole, unsharded matrix; static.
  """

  w: Any
  stat: Any
  counts: Any
  statistic: Statistic = dataclasses.field(metadata=dict(static=True))
  sizes: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)`; `eq` contracts the input axis of `w`.

    Raises:
      UserError: `counts` are not those of the rows of `x`.
    """
    left, right = eq.split("->")[0].split(",")
    if left[-1] != right[0] or len(right) != 2:
      raise UserError(f"a tap takes x[..., in] times w[in, out], not {eq!r}")
    counts = self.counts
    if counts is not None and counts.shape != x.shape[:-1]:
      # A router's input has the same rows, flattened.
      if counts.size != x.size // x.shape[-1]:
        raise UserError(
          f"taps: counts are {counts.shape}, a weight's inputs {x.shape}.\n"
          "A head gets chunks of rows, a router on a mesh its device's rows:"
          " leave it out of the addresses, or give no counts."
        )
      counts = counts.reshape(x.shape[:-1])
    y = weights.einsum(eq, x, self.w)
    return _watched(self.statistic, y, self.stat, x, counts, None)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `w`; embedding lookups are not recorded."""
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the grouped matmul; collects one statistic per expert.

    Rows are sorted by expert, so `counts` cannot be matched to them: a row
    counts as 1 if the loss depends on it (it does not for padding), else 0.

    Raises:
      UserError: the mesh shards the experts' inner width.
    """
    if tuple(self.shape[-2:]) != self.sizes:
      raise UserError(
        f"taps: a device has {self.shape[-2:]} of experts of {self.sizes}.\n"
        "Collect on a mesh that does not shard experts: TENSOR=1."
      )
    y = weights.ragged_dot(x, self.w, sizes)
    return _watched(self.statistic, y, self.stat, x, None, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the logical array."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "Tap":
    """Returns the weight's axis names; statistics are replicated."""
    lead = names[:-2]
    shapes = self.statistic.shapes(*self.sizes)
    return dataclasses.replace(
      self,
      w=weights.axes(self.w, names),
      stat={
        name: weights.axes(x, (*lead, *[None] * len(shapes[name])))
        for name, x in self.stat.items()
      },
      counts=None if self.counts is None else weights.axes(self.counts, ()),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(statistic, y, stat, x, counts, sizes):
  """Returns `y`; the VJP sets the cotangent of `stat` to the statistic."""
  return y


def _watched_fwd(statistic, y, stat, x, counts, sizes):
  return y, (x, counts, sizes)


def _watched_bwd(statistic, saved, dy):
  return dy, statistic.compute(Rows(saved[0], dy, *saved[1:])), None, None, None


_watched.defvjp(_watched_fwd, _watched_bwd)


def collect(
  loss: Callable[[Params], Float[Array, ""]],
  params: Params,
  statistic: Statistic,
  counts: Float[Array, "B T"] | None = None,
  addresses: Collection[str] | None = None,
) -> dict[str, dict[str, Array]]:
  """Returns the statistic of every weight's inputs or gradients; jit it.

  Covers matrices in layers, experts, and `head`. If a weight is used twice in
  one call, its statistics are summed.

  Args:
    loss: any scalar function that uses the activations in question.
    params: any tree of weights.
    statistic: see `research.taps.statistics`.
    counts: weight of each token, for example a batch's `weights`.
    addresses: addresses of the weights to record (`layers/3/attention/q`), or
      None for all. All layers of a run are recorded if any of them is listed.

  Returns:
    Path in `params` -> arrays of the statistic; `by_address` splits layers.

  Raises:
    UserError: `counts` are given and the mesh shards the tokens of a row.
  """
  if counts is not None:
    _check_order(counts)

  def tapped(path, w):
    found = _rows(params, path)
    if found is None or len(w.shape) < 2 + (len(found) > 0):
      return w
    if addresses is not None and not set(_addresses(path, found)) & {
      *addresses
    }:
      return w
    lead, n = w.shape[:-2], w.shape[: len(found) > 0]
    sizes = tuple(w.shape[-2:])
    stat = {
      name: jnp.zeros((*lead, *shape))
      for name, shape in statistic.shapes(*sizes).items()
    }
    token_counts = counts
    if counts is not None:
      token_counts = jnp.broadcast_to(counts, (*n, *counts.shape))
    return weights.map_inner(
      w, lambda w: Tap(w, stat, token_counts, statistic, sizes)
    )

  taps = tree.map_paths(tapped, params, is_leaf=weights.is_weight)
  stats, rest = tree.partition(taps, _STAT)
  value, pull = jax.vjp(lambda s: loss(tree.combine(s, rest)), stats)
  (found,) = pull(jnp.ones_like(value))
  out = {}

  def note(path, w):
    if isinstance(w, Tap):
      out[path] = dict(w.stat)
    return w

  for path, w in weights.named_weights(found):
    weights.map_inner(w, functools.partial(note, path))
  return out


def _check_order(counts):
  cut = sharding.activation_axes(counts.shape, "batch", "length")[1]
  if cut and "ulysses" not in cut:
    raise UserError(
      "taps: found counts on a mesh that shards the tokens of a row, where"
      " layers see them in zig-zag order.\n"
      "Collect with SEQUENCE=1 and RING=1, or give no counts."
    )


def by_address(params: Params, found: Statistics) -> dict[str, dict[str, Any]]:
  """Splits the result of `collect` by layer address: `layers/3/attention/q`."""
  out = {}
  for path, arrays in found.items():
    rows = _rows(params, path)
    for k, address in enumerate(_addresses(path, rows)):
      out[address] = {name: x[k] if rows else x for name, x in arrays.items()}
  return out


def _rows(params: Params, path: str) -> range | tuple | None:
  """Returns the layers stacked in a weight, () for the head, else None."""
  if path == "head":
    return ()
  return tree.layer_indices(params).get("/".join(path.split("/")[:2]))


def _addresses(path: str, rows: Collection[int]) -> list[str]:
  inner = path.split("/", 2)[-1]
  return [f"layers/{i}/{inner}" for i in rows] or [path]
