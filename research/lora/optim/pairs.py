"""Finds LoRA's factor pairs (a, b) in a tree, for optimizers that couple them.

`a [..., r, in]` and `b [..., r, out]` have the same path but for the last name,
except that `a` may be a fixed array of its adapter (`q/fixed/a` with
`q/trained/b`). Stacks of layers and experts are leading axes. The adapter's
method must declare the pair (`Method.pair_scale`), since KaSA, AdaLoRA and
others have an `a` and a `b` whose update is not `s aᵀ b`.
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
"""Last path components of a pair's down and up projection."""


@dataclasses.dataclass(frozen=True)
class Pair:
  """Paths of a factor pair, and the scale `s` of its product.

  Attributes:
    down: path of `a`.
    up: path of `b`.
    scale: `s` of the pair's adapter; 1 outside of adapters.
  """

  down: str
  up: str
  scale: float


def pairs(params: Any, matching: str = ".") -> list[Pair]:
  """Returns the pairs of a tree, in its order.

  Args:
    matching: regular expression, searched for in the path of `a`.

  Raises:
    UserError: there is no pair, or one whose update is not `s aᵀ b`.
  """
  owners, matches = _owners(params), []
  for path, owner in owners.items():
    up = re.sub(rf"((^|/)fixed/|(?<![^/])){DOWN}$", _up_path, path)
    if up == path or up not in owners or not re.search(matching, path):
      continue
    scale = 1.0 if owner is None else owner.pair_scale
    if scale is None:
      raise UserError(
        f"pairs: {path}: {type(owner).__name__} adds another update than the "
        "product of a and b, which this optimizer needs.\nExpected plain LoRA "
        "or a method with its update; leave others out with `matching`."
      )
    matches.append(Pair(path, up, float(scale)))
  if not matches:
    raise UserError(
      f"pairs: {matching!r} matches none of {len(owners)} trainable arrays that"
      f" end in /{DOWN} and have a partner in /{UP}.\n"
      "Expected both factors of an adapter to be trainable: '/trained/'."
    )
  return matches


def _up_path(a: re.Match[str]) -> str:
  return f"{a[2]}trained/{UP}" if a[1] else UP


def _owners(part: Any, prefix: str = "", owner: Any = None) -> dict[str, Any]:
  """Returns path -> method of the adapter that owns each array, or None."""
  out = {}
  path_leaves, _ = jax.tree_util.tree_flatten_with_path(
    part, is_leaf=lambda x: x is not part and weights.is_weight(x)
  )
  for keys, leaf in path_leaves:
    path = prefix + tree.path_name(keys)
    if weights.is_weight(leaf):
      out |= _owners(leaf, f"{path}/", getattr(leaf, "method", owner))
    else:
      out[path] = owner
  return out


def methods(params: Any) -> dict[str, Any]:
  """Returns path -> method of each adapter with trained arrays."""
  owners = _owners(params).items()
  parts = ((re.fullmatch(r"(.+)/trained/[^/]+", p), m) for p, m in owners)
  return {path[1]: method for path, method in parts if path and method}


PairUpdate = Callable[
  [Array, Array, Array, Array, float], tuple[Float[Array, "..."], ...]
]
"""(a, b, gradient of a, gradient of b, s) -> updates of a and b, float32."""


def map_pairs(
  change: PairUpdate, updates: Any, params: Any, matching: str
) -> Any:
  """Returns `updates` with `change` applied to each pair.

  Args:
    change: receives float32 (or wider) arrays; its results are cast to the
      updates' dtypes.
  """
  if params is None:
    raise ValueError("pairs: the update needs the parameters")
  values = dict(tree.flatten_paths(params))
  moves = dict(tree.flatten_paths(updates))
  for pair in pairs(params, matching):
    places = pair.down, pair.up
    arrays = [
      _as_float32(of[path]) for of in (values, moves) for path in places
    ]
    changed = change(*arrays, pair.scale)
    for path, new in zip(places, changed, strict=True):
      moves[path] = new.astype(moves[path].dtype)
  return tree.map_paths(lambda path, _: moves[path], updates)


def stateless(
  change: PairUpdate, matching: str
) -> optax.GradientTransformation:
  """Returns `map_pairs` as a stateless gradient transformation."""

  def init(params):
    pairs(params, matching)  # raises before the first step
    return optax.EmptyState()

  def update(updates, state, params=None):
    return map_pairs(change, updates, params, matching), state

  return optax.GradientTransformation(init, update)


def _as_float32(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gram(
  x: Float[Array, "*B R N"], damping: float | int = 0.0
) -> Float[Array, "*B R R"]:
  """Returns `x xᵀ + (damping + 4 eps trace) I`.

  The second term, below the product's rounding error, makes the Cholesky
  factorization succeed.
  """
  product = jnp.einsum("...rn,...sn->...rs", x, x)
  trace = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
  more = damping + 4 * jnp.finfo(x.dtype).eps * trace
  return product + more * jnp.eye(x.shape[-2], dtype=x.dtype)


def solve(
  positive: Float[Array, "*B R R"], x: Float[Array, "*B R N"]
) -> Float[Array, "*B R N"]:
  """Returns `positive⁻¹ x` by Cholesky factorization."""
  factor = jnp.linalg.cholesky(positive)
  half = jax.lax.linalg.triangular_solve(factor, x, left_side=True, lower=True)
  return jax.lax.linalg.triangular_solve(
    factor, half, left_side=True, lower=True, transpose_a=True
  )
