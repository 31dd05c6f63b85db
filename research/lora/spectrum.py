"""Singular values and vectors of a weight, the largest or the smallest."""

import jax
import jax.numpy as jnp

from research.typing import Array, Float

Triple = tuple[Float[Array, "I R"], Float[Array, " R"], Float[Array, "R O"]]

_EXACT = jax.lax.Precision.HIGHEST


def largest(w: Float[Array, "I O"], rank: int) -> Triple:
  """Returns (u, s, v) with `u s v` the best approximation of that rank.

  From the eigenvectors of the smaller Gram matrix, five times faster than a
  singular value decomposition here (576 x 1536); values are read off `w`
  itself, so an error of the vectors enters them squared.

  Args:
    w: fp32.
    rank: at most the smaller side.
  """
  if w.shape[0] > w.shape[1]:
    v, s, u = largest(w.T, rank)
    return u.T, s, v.T
  _, vectors = jnp.linalg.eigh(jnp.matmul(w, w.T, precision=_EXACT))
  u = vectors[:, ::-1][:, :rank]
  v = jnp.matmul(u.T, w, precision=_EXACT)
  s = jnp.linalg.norm(v, axis=1)
  return u, s, v / jnp.maximum(s, jnp.finfo(w.dtype).tiny)[:, None]


def smallest(w: Float[Array, "I O"], rank: int) -> Triple:
  """Returns the last `rank` singular triples, largest first."""
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  return u[:, -rank:], s[-rank:], v[-rank:]
