"""How a model computes under a mesh: what is gathered, what is added up when.

Without a mesh, or on one device, each function does nothing. Most of the work
is XLA's, which follows `sharding.constrain`; here is what it would do badly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research import sharding, tree, weights
from research.typing import Array, Shaped


def gather(w: Any, *names: str | None) -> Any:
  """Returns a weight with all of its parts whole along `width`, for its use.

  Args:
    w: any weight.
    names: of its logical axes.
  """
  if not sharding.is_cut():
    return w
  return jax.tree.map(_whole, w, sharding.part_names(w, names))


def gather_parts(layer: Any) -> Any:
  """Returns a layer's weights, packed and low-rank parts whole along `width`.

  XLA gathers an array where it is multiplied, after the cast to the compute
  type; it would gather a packed matrix there, too, decoded and so many times
  as large. Experts are left to `research.nn.moe.mixture`.

  Args:
    layer: parameters of one layer, or of a period of them.
  """
  if not sharding.is_cut():
    return layer

  def one(path, leaf):
    names = sharding.names_of(path)
    if names is None or "expert" in names or not weights.is_weight(leaf):
      return leaf

    def part(x, names):
      logical = x.shape == leaf.shape and jnp.issubdtype(x.dtype, jnp.floating)
      return x if logical else _whole(x, names)

    return jax.tree.map(part, leaf, sharding.part_names(leaf, names))

  return tree.map_paths(one, layer, is_leaf=weights.is_weight)


def _whole(x, names):
  """Returns an array whole along `width`, cut as it is along other axes."""
  if names.names is None or "width" not in names.names:
    return x
  free = PartitionSpec.UNCONSTRAINED
  spec = [None if name == "width" else free for name in names.names]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def map_tokens(
  f: Callable[..., Any], parts: Any, *arrays: Shaped[Array, "B T ..."]
) -> Any:
  """Returns `f(parts, *arrays)`, `[B, T, ...]`, on each device's own tokens.

  Args:
    f: treats each row and position alone.
    parts: what every device needs whole, but for what `tensor` cuts. Gradients
      with respect to it are added up once, whatever `f` loops over.
    *arrays: cut along B and T as activations are.
  """
  return _over_tokens(f, parts, arrays, add=False)


def sum_over_tokens(
  f: Callable[..., Any], parts: Any, *arrays: Shaped[Array, "B T ..."]
) -> Any:
  """Returns `f(parts, *arrays)`, sums over tokens; else as `map_tokens`."""
  return _over_tokens(f, parts, arrays, add=True)


def _over_tokens(f, parts, arrays, add):
  batch, length = sharding.cuts(arrays[0].shape[:2], "batch", "length")
  axes = (*batch, *length)
  if not axes:
    return f(parts, *arrays)

  def local(parts, *arrays):
    # Told apart from here on, so that the sum over devices is the last thing
    # that happens to a gradient.
    found = f(jax.lax.pcast(parts, axes, to="varying"), *arrays)
    return jax.lax.psum(found, axes) if add else found

  cut = PartitionSpec(batch, length)
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(), *(cut,) * len(arrays)),
    out_specs=PartitionSpec() if add else cut,
    axis_names=set(axes),
  )(parts, *arrays)
