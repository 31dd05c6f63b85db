"""Whether weights are the same for all rows, as where rows come and go."""

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


def _changes(params: Any, f: Callable[[Any], Any]) -> bool:
  after = jax.eval_shape(lambda: f(params))
  return jax.tree.structure(after) != jax.tree.structure(params)
