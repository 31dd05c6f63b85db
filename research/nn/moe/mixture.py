"""Mixture-of-experts computation, on one device and under a mesh.

Exact: there is no capacity limit, and no token is dropped. All (token, expert)
pairs are sorted by expert, so each projection is one grouped matmul
(`weights.ragged_dot`) over stacked weights `[E, in, out]`. A token's expert
outputs are summed in the order of its own choices, not by scatter-add, so the
result does not depend on the other tokens in the batch.

Under a mesh, each device routes and sorts its own tokens. If experts are
sharded, a device computes its own experts: it receives the tokens of all
devices along that axis (all-gather) and returns its part of each token's sum
(reduce-scatter). Besides the communication of the weights, that is all. Sizes
are static whatever the router does, so nothing is dropped.
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
  """The mesh axes (possibly none) that shard a mixture's inputs and weights.

  Attributes:
    tokens: axes that shard tokens: those of the batch and of the sequence.
    experts: axes that shard the experts.
    hidden: axes that shard each expert's inner width.
  """

  tokens: Names = ()
  experts: Names = ()
  hidden: Names = ()

  @property
  def replicated_tokens(self) -> Names:
    """Axes along which devices have the same tokens but different weights."""
    found = (*self.experts, *self.hidden)
    return tuple(a for a in found if a not in self.tokens)


def sort_by_expert(
  ids: Int[Array, "T C"], experts: int
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "E"]]:
  """Sorts (token, choice) pairs by expert.

  Args:
    ids: the experts of each token.
    experts: `E`.

  Returns:
    `(order, inverse, sizes)`: sorted row i is pair `order[i]`, of token
    `order[i] // C`; pair j is in row `inverse[j]`; `sizes` is the number of
    rows of each expert.
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
  params: Mapping[str, AnyWeight],
  x: Float[Array, "B T D"],
  real: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Load]:
  """Returns `sum_c weight_c expert_c(x)`, and the router load.

  The router always computes in fp32.

  Args:
    routing: how experts are selected and weighted.
    activation: activation function of their gates.
    params: `router [D, E]`, `router_bias [E]` if the routing has one, `gate`
      and `up` `[E, D, F]` and `down` `[E, F, D]`.
    x: activations.
    real: false at padding, which is computed but excluded from the load.
  """
  real = jnp.ones(x.shape[:2], bool) if real is None else real
  if not sharding.is_cut():
    return _mixed(routing, activation, params, x, real, Split())
  batch, length, _ = sharding.activation_axes(x.shape, "batch", "length", None)
  split = _split((*batch, *length), params)
  specs = _specs(params, split)

  def local(params, x, real):
    params = _own_keys(_as_varying(params, specs, split), split.tokens)
    return _mixed(routing, activation, params, x, real, split)

  tokens = PartitionSpec(batch, length)
  return jax.shard_map(
    local,
    in_specs=(specs, tokens, tokens),
    out_specs=(tokens, PartitionSpec()),
  )(dict(params), x, real)


def _mixed(routing, activation, params, x, real, split):
  """Computes `mixture` for the tokens and experts of one device."""
  flat = x.reshape(-1, x.shape[-1])
  router = params["router"]
  logits = weights.einsum("...d,de->...e", flat.astype(jnp.float32), router)
  ids, shares = routings.select_experts(
    routing, logits, params.get("router_bias")
  )
  mine = (flat, ids, shares)
  exchanged = tuple(a for a in split.experts if a in split.tokens)
  if exchanged:
    mine = jax.lax.all_gather(mine, exchanged, tiled=True)
  if split.replicated_tokens:
    mine = jax.lax.pcast(mine, split.replicated_tokens, to="varying")
  y = _of_own_experts(routing.experts, activation, params, *mine, split)
  if split.replicated_tokens:
    y = jax.lax.psum(y, split.replicated_tokens)
  if exchanged:
    y = jax.lax.psum_scatter(y, exchanged, tiled=True)
  load = routings.load(routing, logits, ids, real.reshape(-1))
  if split.tokens:
    load = jax.lax.psum(load, split.tokens)
  return y.reshape(x.shape), load


def _of_own_experts(experts, activation, params, flat, ids, shares, split):
  """Returns `[T, D]`: each token's sum over this device's experts."""
  here = experts
  if split.experts:
    # Own experts first; ragged_dot returns 0 for the rows after theirs.
    here = params["down"].shape[0]
    first = jax.lax.axis_index(split.experts) * here
    ids = jnp.mod(ids - first, experts)
  order, inverse, sizes = sort_by_expert(ids, experts)
  rows = flat[order // ids.shape[-1]]
  y = _feed_forward(activation, params, rows, sizes[:here])
  y = y.at[inverse].get(unique_indices=True)
  y = y.reshape(*ids.shape, flat.shape[-1])
  return jnp.einsum("tcd,tc->td", y, shares.astype(y.dtype))


def _feed_forward(activation, params, x, sizes):
  """Returns `(act(x gate) * (x up)) down` of each row's expert."""
  gate = checkpoint_name(weights.ragged_dot(x, params["gate"], sizes), "gate")
  up = checkpoint_name(weights.ragged_dot(x, params["up"], sizes), "up")
  product = ACTIVATIONS[activation](gate) * up
  return weights.ragged_dot(product, params["down"], sizes)


def _split(tokens: Names, params: Mapping[str, AnyWeight]) -> Split:
  """Returns how the mesh shards tokens and experts.

  The hidden axis stays unsharded if the mesh does not divide some array of a
  weight, such as its quantization blocks.
  """
  experts, hidden, _ = sharding.activation_axes(
    params["down"].shape, *_AXES["down"]
  )
  pieces = math.gcd(*(n for name in _AXES for n in _sizes(params, name)))
  if not hidden or sharding.activation_axes((pieces,), "hidden") != (hidden,):
    hidden = ()
  return Split(tokens, experts, hidden)


def _sizes(params, name):
  """Returns the size of the `hidden` axis of each array of a weight."""
  named = _parts(
    params, name, lambda x, names: dict(zip(names, x.shape, strict=False))
  )
  parts = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, dict))
  return [part["hidden"] for part in parts if "hidden" in part]


def _parts(params, name, f):
  """Maps `f(array, axis names)` over the arrays of a weight.

  Weights without an entry in `_AXES`, and dropout keys, have no names.
  """
  w = params[name]
  names = weights.axes(w, _AXES[name]) if name in _AXES else None
  if names is None:
    return jax.tree.map(lambda x: f(x, ()), w)
  return jax.tree.map(lambda x, n: f(x, n or ()), w, names)


def _specs(params, split) -> dict[str, Any]:
  """Returns the PartitionSpec of each array of the weights."""
  cut = {"expert": split.experts, "hidden": split.hidden}

  def spec(x, names):
    return PartitionSpec(*(cut.get(n) for n in names))

  return {name: _parts(params, name, spec) for name in params}


def _as_varying(params, specs, split):
  """Marks the weights as device-varying over all axes that they lack.

  Their gradients are then summed over devices after all products, and the
  products need no knowledge of the mesh.
  """

  def own(axes, x, spec):
    cut = {a for part in sharding.spec_axes(spec, x.ndim) for a in part}
    missing = tuple(a for a in axes if a not in cut)
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  out = {}
  for name, w in params.items():
    axes = split.tokens + (split.replicated_tokens if name in _AXES else ())
    out[name] = jax.tree.map(functools.partial(own, axes), w, specs[name])
  return out


def _own_keys(params, axes: Names):
  """Folds the device's token shard into the weights' dropout keys."""
  if not axes:
    return params

  def own(x):
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x
    index = jax.lax.axis_index(axes)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return fold(x.reshape(-1), index).reshape(x.shape)

  return jax.tree.map(own, params)
