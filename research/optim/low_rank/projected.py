"""Trees of projectors: which matrices have one, and when it is renewed."""

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research import tree
from research.optim import matching
from research.optim.low_rank.subspace import Projection
from research.typing import Array


def zeros(projection: Projection, matrices: str, params: Any) -> Any:
  """Returns a projector of zeros for each matrix, None for all else.

  Args:
    projection: how matrices are projected.
    matrices: regular expression, searched for in the paths of those arrays
      whose last two axes are inputs and outputs of a matrix.
    params: the trainable parameters.

  Raises:
    UserError: no matrix has such a path.
  """

  def one(path, x):
    if x.ndim < 2 or re.search(matrices, path) is None:
      return None
    return jnp.zeros(
      projection.shape(x.shape), jnp.promote_types(x.dtype, jnp.float32)
    )

  made = tree.map_paths(one, params)
  if not jax.tree.leaves(made):
    paths = [path for path, _ in tree.flatten_paths(params)]
    raise matching.no_matrix("matrices", matrices, paths)
  return made


def renewed(
  projection: Projection, updates: Any, projectors: Any, count: Array
) -> Any:
  """Returns the projectors of these gradients.

  Args:
    projection: how matrices are projected.
    updates: gradients.
    projectors: what they take the place of.
    count: updates done, for the keys of random bases.
  """
  key = jax.random.fold_in(jax.random.key(projection.seed), count)

  def one(path, g, last):
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return projection.fresh(g, last, own).astype(last.dtype)

  found = dict(tree.flatten_paths(updates))
  return tree.map_paths(lambda p, last: one(p, found[p], last), projectors)


def each(
  f: Callable[[Array, Array], Any], updates: Any, projectors: Any
) -> Any:
  """Returns `updates` with `f(gradient, projector)` for each matrix."""
  found = dict(tree.flatten_paths(projectors))
  return tree.map_paths(
    lambda path, g: f(g, found[path]) if path in found else g, updates
  )


def shrunk(projection: Projection, updates: Any, projectors: Any) -> Any:
  """Returns `updates` with R in place of each matrix's gradient."""

  def down(g, projector):
    return projection.down(g.astype(projector.dtype), projector)

  return each(down, updates, projectors)
