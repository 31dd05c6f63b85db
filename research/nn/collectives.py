"""Explicit communication of a sharded model: weight gathering, token sums.

Without a mesh, or on one device, these functions do nothing. XLA inserts most
collectives itself, from the constraints of `sharding.constrain`; this module
handles the cases that it handles badly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research import sharding, tree, weights
from research.typing import Array, Shaped


def gather(w: Any, *names: str | None) -> Any:
  """All-gathers a weight along `width` (FSDP) before it is used.

  Args:
    w: any weight; all its arrays are gathered.
    names: its logical axes.
  """
  if not sharding.is_cut():
    return w
  return jax.tree.map(_unsharded, w, sharding.part_names(w, names))


def gather_parts(layer: Any) -> Any:
  """All-gathers packed and low-rank arrays of a layer along `width`.

  XLA gathers an array right before the product, after the cast to the compute
  dtype. It would gather a packed matrix after decoding, when it is several
  times as large. Experts are handled by `research.nn.moe.mixture`.

  Args:
    layer: parameters of one layer, or of one period of layers.
  """
  if not sharding.is_cut():
    return layer

  def one(path, leaf):
    names = sharding.logical_axes(path)
    if names is None or "expert" in names or not weights.is_weight(leaf):
      return leaf

    def part(x, names):
      logical = x.shape == leaf.shape and jnp.issubdtype(x.dtype, jnp.floating)
      return x if logical else _unsharded(x, names)

    return jax.tree.map(part, leaf, sharding.part_names(leaf, names))

  return tree.map_paths(one, layer, is_leaf=weights.is_weight)


def _unsharded(x, names):
  """Constrains `x` to be unsharded along `width`; XLA decides other axes."""
  if names.names is None or "width" not in names.names:
    return x
  free = PartitionSpec.UNCONSTRAINED
  spec = [None if name == "width" else free for name in names.names]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def map_tokens(
  f: Callable[..., Any], parts: Any, *arrays: Shaped[Array, "B T ..."]
) -> Any:
  """Returns `f(parts, *arrays)`, computed by each device for its own tokens.

  Args:
    f: a function that treats each row and position independently and returns
      arrays `[B, T, ...]`.
    parts: inputs that every device needs in full (sharded over `tensor` only).
      Their gradients are summed over devices once, however often `f` loops.
    *arrays: sharded along B and T like activations.
  """
  return _over_tokens(f, parts, arrays, add=False)


def sum_over_tokens(
  f: Callable[..., Any], parts: Any, *arrays: Shaped[Array, "B T ..."]
) -> Any:
  """Returns the sum over all tokens of `f(parts, *arrays)`.

  Arguments are those of `map_tokens`; `f` returns sums over its tokens.
  """
  return _over_tokens(f, parts, arrays, add=True)


def _over_tokens(f, parts, arrays, add):
  batch, length = sharding.activation_axes(
    arrays[0].shape[:2], "batch", "length"
  )
  axes = (*batch, *length)
  if not axes:
    return f(parts, *arrays)

  def local(parts, *arrays):
    # Varying from here on, so that the sum over devices is the last operation
    # on a gradient.
    result = f(jax.lax.pcast(parts, axes, to="varying"), *arrays)
    return jax.lax.psum(result, axes) if add else result

  cut = PartitionSpec(batch, length)
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(), *(cut,) * len(arrays)),
    out_specs=PartitionSpec() if add else cut,
    axis_names=set(axes),
  )(parts, *arrays)
