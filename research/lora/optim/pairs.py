"""Pairs of thin factors in a tree, found by their paths.

`a [..., r, in]` and `b [..., r, out]` are siblings: their paths differ in the
last name alone, but that `a` may be among the fixed arrays of its adapter
(`q/fixed/a` beside `q/trained/b`). What knows a pair can use both in one
update, however deep it lies; stacks of layers and of experts are axes in front.
Their method has to say that they are one (`Method.pair_scale`): KaSA, AdaLoRA
and others have an `a` and a `b` that stand in another product.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import tree, weights
from research.typing import Array, Float, UserError

DOWN, UP = "a", "b"
"""Last names of a pair's paths."""


@dataclasses.dataclass(frozen=True)
class Pair:
  """Where a pair lies, and the scale `s` of its product.

  Attributes:
    down: path of `a`.
    up: path of `b`.
    scale: `s` of the adapter that it belongs to; 1 outside of any.
  """

  down: str
  up: str
  scale: float


def pairs(params: Any, matching: str = ".") -> list[Pair]:
  """Returns the pairs of a tree, in its order.

  Args:
    params: any part of a tree of weights.
    matching: regular expression, searched for in the path of `a`.

  Raises:
    UserError: there is none, or one that adds another product.
  """
  owners, found = _owners(params), []
  for path, owner in owners.items():
    up = re.sub(rf"((^|/)fixed/|(?<![^/])){DOWN}$", _beside, path)
    if up == path or up not in owners or not re.search(matching, path):
      continue
    scale = 1.0 if owner is None else owner.pair_scale
    if scale is None:
      raise UserError(
        f"pairs: {path}: {type(owner).__name__} adds something else than the "
        "product of a and b, which this optimizer moves.\nExpected plain LoRA, "
        "or what starts as such; leave others out with `matching`."
      )
    found.append(Pair(path, up, float(scale)))
  if not found:
    raise UserError(
      f"pairs: {matching!r} matches none of {len(owners)} trainable arrays that"
      f" end in /{DOWN} beside one that ends in /{UP}.\n"
      "Expected both factors of an adapter to be trainable: '/trained/'."
    )
  return found


def _beside(a: re.Match[str]) -> str:
  return f"{a[2]}trained/{UP}" if a[1] else UP


def _owners(part: Any, prefix: str = "", owner: Any = None) -> dict[str, Any]:
  """Returns the method of the adapter around each array of a tree, by path."""
  out = {}
  found, _ = jax.tree_util.tree_flatten_with_path(
    part, is_leaf=lambda x: x is not part and weights.is_weight(x)
  )
  for keys, leaf in found:
    path = prefix + tree.path_name(keys)
    if weights.is_weight(leaf):
      out |= _owners(leaf, f"{path}/", getattr(leaf, "method", owner))
    else:
      out[path] = owner
  return out


def methods(params: Any) -> dict[str, Any]:
  """Returns the method of each adapter of a tree that is trained, by path."""
  found = _owners(params).items()
  parts = ((re.fullmatch(r"(.+)/trained/[^/]+", p), m) for p, m in found)
  return {path[1]: method for path, method in parts if path and method}


Change = Callable[
  [Array, Array, Array, Array, float], tuple[Float[Array, "..."], ...]
]
"""(a, b, gradient of a, gradient of b, s) -> their updates, in float32."""


def map_pairs(change: Change, updates: Any, params: Any, matching: str) -> Any:
  """Returns `updates` with those of each pair changed together.

  Args:
    change: sees float32 (or wider) arrays; its results get the updates' types.
    updates: gradients, in the structure of `params`.
    params: the trainable parameters.
    matching: as in `pairs`.
  """
  if params is None:
    raise ValueError("pairs: the update needs the parameters")
  values = dict(tree.flatten_paths(params))
  moves = dict(tree.flatten_paths(updates))
  for pair in pairs(params, matching):
    places = pair.down, pair.up
    given = [_wide(of[path]) for of in (values, moves) for path in places]
    changed = change(*given, pair.scale)
    for path, new in zip(places, changed, strict=True):
      moves[path] = new.astype(moves[path].dtype)
  return tree.map_paths(lambda path, _: moves[path], updates)


def stateless(change: Change, matching: str) -> optax.GradientTransformation:
  """Returns the transformation that changes pairs and remembers nothing.

  Args:
    change: see `map_pairs`.
    matching: as in `pairs`.
  """

  def init(params):
    pairs(params, matching)  # a pattern that matches nothing is said now
    return optax.EmptyState()

  def update(updates, state, params=None):
    return map_pairs(change, updates, params, matching), state

  return optax.GradientTransformation(init, update)


def _wide(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gram(
  x: Float[Array, "*B R N"], damping: float | int = 0.0
) -> Float[Array, "*B R R"]:
  """Returns `x xᵀ + damping I`, and so much more that Cholesky's root exists.

  That is 4 roundings of the trace: less than what is lost in the product.
  """
  product = jnp.einsum("...rn,...sn->...rs", x, x)
  trace = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
  more = damping + 4 * jnp.finfo(x.dtype).eps * trace
  return product + more * jnp.eye(x.shape[-2], dtype=x.dtype)


def solve(
  positive: Float[Array, "*B R R"], x: Float[Array, "*B R N"]
) -> Float[Array, "*B R N"]:
  """Returns `positive⁻¹ x` by Cholesky's factor."""
  factor = jnp.linalg.cholesky(positive)
  half = jax.lax.linalg.triangular_solve(factor, x, left_side=True, lower=True)
  return jax.lax.linalg.triangular_solve(
    factor, half, left_side=True, lower=True, transpose_a=True
  )
