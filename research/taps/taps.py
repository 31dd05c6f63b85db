"""What weights see: sums over activations and gradients, from one `vjp`.

A `Tap` is a weight that multiplies as the one inside it does. It carries a
`stat` of zeros that the product does not depend on, and whose cotangent, by
definition, is a statistic of this product's rows: the inputs' covariance, say.
So one `vjp` of an unchanged model yields it for every layer, in stacks that
are scanned and computed again, under a mesh, and through any weight inside:

  loss(params with taps) -> cotangents of all `stat` = statistics of all layers

What does not need the backward pass is compiled without one.
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

Found = Mapping[str, Mapping[str, Any]]
"""path of a weight -> its statistic's arrays, stacked as the weight is."""

_STAT = r"(^|/)stat/\w+$"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap(weights.WrappedWeight):
  """A weight `[..., in, out]` and what is to be seen of its use.

  Attributes:
    w: the weight, of any kind.
    stat: zeros, one array for each that the statistic has, `[..., its shape]`.
    counts: how much each token counts, `[layers, B, T]`, or None for 1.
    statistic: what is seen; static.
    sizes: (in, out) of the whole matrix, as no mesh has cut it; static.
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
      # A router sees the same rows, flat.
      if counts.size != x.size // x.shape[-1]:
        raise UserError(
          f"taps: counts are {counts.shape}, a weight's inputs {x.shape}.\n"
          "A head sees chunks of rows, a router on a mesh its device's: leave"
          " it out, or count all alike."
        )
      counts = counts.reshape(x.shape[:-1])
    y = weights.einsum(eq, x, self.w)
    return _watched(self.statistic, y, self.stat, x, counts, None)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of `w`; looking up is not seen."""
    return weights.take(self.w, ids)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the experts' matmul; each expert has a statistic of its own.

    Rows are sorted by expert, so tokens are not told apart: a row counts as 1
    if the loss depends on it, which it does not on padding.

    Raises:
      UserError: a mesh cuts the experts' inner width.
    """
    if tuple(self.shape[-2:]) != self.sizes:
      raise UserError(
        f"taps: a device has {self.shape[-2:]} of experts of {self.sizes}.\n"
        "Collect on a mesh that does not cut them: TENSOR=1."
      )
    y = weights.ragged_dot(x, self.w, sizes)
    return _watched(self.statistic, y, self.stat, x, None, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the logical array."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "Tap":
    """The weight's names; statistics are whole on each device."""
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
  """Returns `y`, the product of `x`; `stat` is given the statistic of both."""
  return y


def _watched_fwd(statistic, y, stat, x, counts, sizes):
  return y, (x, counts, sizes)


def _watched_bwd(statistic, saved, dy):
  return dy, statistic.of(Rows(saved[0], dy, *saved[1:])), None, None, None


_watched.defvjp(_watched_fwd, _watched_bwd)


def collect(
  loss: Callable[[Params], Float[Array, ""]],
  params: Params,
  statistic: Statistic,
  counts: Float[Array, "B T"] | None = None,
  addresses: Collection[str] | None = None,
) -> dict[str, dict[str, Array]]:
  """Returns the statistic of each weight's inputs, or gradients; jit it.

  A weight that is used twice in one call adds both up.

  Args:
    loss: any scalar that the activations in question lead to.
    params: any tree of weights; matrices in layers, experts, and `head`.
    statistic: see `research.taps.statistics`.
    counts: how much each token counts, a batch's `weights`, say.
    addresses: of weights (`layers/3/attention/q`), or None for all; a stack
      is seen whole if any of its layers is among them.

  Returns:
    path in `params` -> the statistic's arrays; `by_address` names layers.

  Raises:
    UserError: a mesh cuts rows, and tokens are counted.
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
    seen = counts
    if counts is not None:
      seen = jnp.broadcast_to(counts, (*n, *counts.shape))
    return weights.within(w, lambda w: Tap(w, stat, seen, statistic, sizes))

  taps = tree.map_paths(tapped, params, is_leaf=weights.is_weight)
  stats, rest = tree.partition(taps, _STAT)
  value, pull = jax.vjp(lambda s: loss(tree.combine(s, rest)), stats)
  (found,) = pull(jnp.ones_like(value))
  out = {}

  def note(path, w):
    if isinstance(w, Tap):
      out[path] = dict(w.stat)
    return w

  for path, w in weights.named(found):
    weights.within(w, functools.partial(note, path))
  return out


def _check_order(counts):
  cut = sharding.cuts(counts.shape, "batch", "length")[1]
  if cut and "ulysses" not in cut:
    raise UserError(
      "taps: where a mesh cuts rows, layers see tokens in another order than"
      " counts.\nCollect with SEQUENCE=1 and RING=1, or count all alike."
    )


def by_address(params: Params, found: Found) -> dict[str, dict[str, Any]]:
  """Returns what `collect` found for each layer: `layers/3/attention/q`."""
  out = {}
  for path, arrays in found.items():
    rows = _rows(params, path)
    for k, address in enumerate(_addresses(path, rows)):
      out[address] = {name: x[k] if rows else x for name, x in arrays.items()}
  return out


def _rows(params: Params, path: str) -> range | tuple | None:
  """Returns the layers that a weight stacks, () for a head, else None."""
  if path == "head":
    return ()
  return tree.layer_indices(params).get("/".join(path.split("/")[:2]))


def _addresses(path: str, rows: Collection[int]) -> list[str]:
  inner = path.split("/", 2)[-1]
  return [f"layers/{i}/{inner}" for i in rows] or [path]
