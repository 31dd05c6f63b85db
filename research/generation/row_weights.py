"""Weights of a batch's rows, where rows come and go."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research import weights


def bound_to_rows(params: Any) -> bool:
  """Whether `weights.bind` would tie some weights to the rows of a batch."""
  return _changes(params, weights.bind)


def bound_to_tokens(params: Any) -> bool:
  """Whether `weights.with_tokens` would tie some weights to a row's tokens."""
  token = jnp.zeros((1, 1), jnp.int32)
  return _changes(params, lambda x: weights.with_tokens(x, token))


def per_row(params: Any) -> bool:
  """Whether some weights are those of a batch's rows, such as their images."""
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  return any(weights.is_weight(w) and w.per_row for w in leaves)


def row_counts(params: Any) -> set[int]:
  """Returns how many rows weights of rows (`per_row`) have; empty if none."""
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  counts = {w.row_count for w in leaves if weights.is_weight(w)}
  return counts - {None}


def without_rows(params: Any) -> Any:
  """Returns a tree whose weights of rows are what they wrap, or None."""

  def one(w):
    if not weights.is_weight(w) or not w.per_row:
      return w
    return w.w if isinstance(w, weights.WrappedWeight) else None

  return jax.tree.map(one, params, is_leaf=weights.is_weight)


def _changes(params: Any, f: Callable[[Any], Any]) -> bool:
  after = jax.eval_shape(lambda: f(params))
  return jax.tree.structure(after) != jax.tree.structure(params)
