"""What tokens get from their experts, on one device and on a mesh.

Exact: no capacity, no dropped token. The rows of all (token, expert) pairs are
sorted by expert, so that each projection is one grouped matmul
(`weights.ragged_dot`) over stacked weights `[E, in, out]`; what a token gets
back is summed in the order of its own choices, never by scattered addition, so
it does not depend on its company.

Under a mesh each device routes and sorts its own tokens. Where the experts are
cut, a device multiplies the rows of its own experts: it gets the tokens of all
devices along that axis (an all-gather), and gives back its part of each
token's sum (a reduce-scatter), which is the only communication beside the
weights' own. Sizes are static whatever the router does, so nothing is dropped.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from research import sharding, weights
from research.nn.mlp import ACTIVATIONS, Activation
from research.nn.moe import routing as routings
from research.nn.moe.routing import Load, Routing
from research.typing import Array, Bool, Float, Int
from research.weights import AnyWeight

Names = tuple[str, ...]

_AXES = {
  "gate": ("expert", "width", "hidden"),
  "up": ("expert", "width", "hidden"),
  "down": ("expert", "hidden", "width"),
}


@dataclasses.dataclass(frozen=True)
class Split:
  """The mesh axes, perhaps none, that cut what a mixture is made of.

  Attributes:
    tokens: the tokens, their batch axes and those of their length.
    experts: the experts.
    hidden: each expert's inner width.
  """

  tokens: Names = ()
  experts: Names = ()
  hidden: Names = ()

  @property
  def alike(self) -> Names:
    """Axes along which devices have the same tokens, but not the same work."""
    found = (*self.experts, *self.hidden)
    return tuple(a for a in found if a not in self.tokens)


def by_expert(
  ids: Int[Array, "T C"], experts: int
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "E"]]:
  """Returns how (token, choice) pairs are sorted by expert.

  Args:
    ids: each token's experts.
    experts: `E`.

  Returns:
    `(order, inverse, sizes)`: pair `order[i]`, of token `order[i] // C`,
    stands in row i; pair j stands in row `inverse[j]`; and how many rows each
    expert has.
  """
  flat = ids.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  rows = jnp.arange(len(flat), dtype=order.dtype)
  inverse = jnp.zeros_like(order).at[order].set(rows, unique_indices=True)
  sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0)
  return order, inverse, sizes.astype(jnp.int32)


def mixture(
  routing: Routing,
  activation: Activation,
  held: Mapping[str, AnyWeight],
  x: Float[Array, "B T D"],
  real: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Load]:
  """Returns `sum_c weight_c expert_c(x)`, and what the router did.

  The router computes in fp32 whatever the dtype of `x`.

  Args:
    routing: which experts, and how they are weighed.
    activation: of their gates.
    held: `router [D, E]`, `router_bias [E]` where the routing has one, `gate`
      and `up` `[E, D, F]` and `down` `[E, F, D]`.
    x: activations.
    real: false at padding, which is computed but does not count.
  """
  real = jnp.ones(x.shape[:2], bool) if real is None else real
  if not sharding.is_cut():
    return _mixed(routing, activation, held, x, real, Split())
  batch, length, _ = sharding.cuts(x.shape, "batch", "length", None)
  split = _split((*batch, *length), held)
  specs = _specs(held, split)

  def local(held, x, real):
    held = _own_keys(_told_apart(held, specs, split), split.tokens)
    return _mixed(routing, activation, held, x, real, split)

  tokens = PartitionSpec(batch, length)
  return jax.shard_map(
    local,
    in_specs=(specs, tokens, tokens),
    out_specs=(tokens, PartitionSpec()),
  )(dict(held), x, real)


def _mixed(routing, activation, held, x, real, split):
  """Returns what `mixture` does of the tokens and experts of one device."""
  flat = x.reshape(-1, x.shape[-1])
  router = held["router"]
  logits = weights.einsum("...d,de->...e", flat.astype(jnp.float32), router)
  ids, shares = routings.choose(routing, logits, held.get("router_bias"))
  mine = (flat, ids, shares)
  exchanged = tuple(a for a in split.experts if a in split.tokens)
  if exchanged:
    mine = jax.lax.all_gather(mine, exchanged, tiled=True)
  if split.alike:
    mine = jax.lax.pcast(mine, split.alike, to="varying")
  y = _of_own_experts(routing.experts, activation, held, *mine, split)
  if split.alike:
    y = jax.lax.psum(y, split.alike)
  if exchanged:
    y = jax.lax.psum_scatter(y, exchanged, tiled=True)
  load = routings.load(routing, logits, ids, real.reshape(-1))
  if split.tokens:
    load = jax.lax.psum(load, split.tokens)
  return y.reshape(x.shape), load


def _of_own_experts(experts, activation, held, flat, ids, shares, split):
  """Returns `[T, D]`: each token's sum over the experts that are here."""
  here = experts
  if split.experts:
    # Own experts first; ragged_dot gives 0 to the rows behind theirs.
    here = held["down"].shape[0]
    first = jax.lax.axis_index(split.experts) * here
    ids = jnp.mod(ids - first, experts)
  order, inverse, sizes = by_expert(ids, experts)
  rows = flat[order // ids.shape[-1]]
  y = _feed_forward(activation, held, rows, sizes[:here])
  y = y.at[inverse].get(unique_indices=True)
  y = y.reshape(*ids.shape, flat.shape[-1])
  return jnp.einsum("tcd,tc->td", y, shares.astype(y.dtype))


def _feed_forward(activation, held, x, sizes):
  """Returns each row's `(act(x gate) * (x up)) down`, of its own expert."""
  gate = checkpoint_name(weights.ragged_dot(x, held["gate"], sizes), "gate")
  up = checkpoint_name(weights.ragged_dot(x, held["up"], sizes), "up")
  product = ACTIVATIONS[activation](gate) * up
  return weights.ragged_dot(product, held["down"], sizes)


def _split(tokens: Names, held: Mapping[str, AnyWeight]) -> Split:
  """Returns how the mesh cuts the experts.

  The hidden axis stays whole where a part of a weight, such as its blocks, is
  not divided.
  """
  experts, hidden, _ = sharding.cuts(held["down"].shape, *_AXES["down"])
  pieces = math.gcd(*(n for name in _AXES for n in _sizes(held, name)))
  if not hidden or sharding.cuts((pieces,), "hidden") != (hidden,):
    hidden = ()
  return Split(tokens, experts, hidden)


def _sizes(held, name):
  """Returns the sizes of all axes of a weight's parts that are hidden units."""
  named = _parts(
    held, name, lambda x, names: dict(zip(names, x.shape, strict=False))
  )
  parts = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, dict))
  return [part["hidden"] for part in parts if "hidden" in part]


def _parts(held, name, f):
  """Returns the weight with `f(array, names of its axes)` for each array.

  Those without an entry in `_AXES`, and dropout keys, have no names.
  """
  w = held[name]
  names = weights.axes(w, _AXES[name]) if name in _AXES else None
  if names is None:
    return jax.tree.map(lambda x: f(x, ()), w)
  return jax.tree.map(lambda x, n: f(x, n or ()), w, names)


def _specs(held, split) -> dict[str, Any]:
  """Returns how each array of the weights is cut, or whole, for its use."""
  cut = {"expert": split.experts, "hidden": split.hidden}

  def spec(x, names):
    return PartitionSpec(*(cut.get(n) for n in names))

  return {name: _parts(held, name, spec) for name in held}


def _told_apart(held, specs, split):
  """Returns the weights as each device's own copies.

  So the sum of their gradients over devices comes after all products, which
  need not know that there are other devices.
  """

  def own(axes, x, spec):
    cut = {a for part in sharding.spec_axes(spec, x.ndim) for a in part}
    missing = tuple(a for a in axes if a not in cut)
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  out = {}
  for name, w in held.items():
    axes = split.tokens + (split.alike if name in _AXES else ())
    out[name] = jax.tree.map(functools.partial(own, axes), w, specs[name])
  return out


def _own_keys(held, axes: Names):
  """Returns the weights with dropout keys of this device's own tokens."""
  if not axes:
    return held

  def own(x):
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x
    index = jax.lax.axis_index(axes)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return fold(x.reshape(-1), index).reshape(x.shape)

  return jax.tree.map(own, held)
