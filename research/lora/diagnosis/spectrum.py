"""Singular values and vectors of a weight, the largest or the smallest."""

import jax
import jax.numpy as jnp

from research.typing import Array, Float

Triple = tuple[Float[Array, "I R"], Float[Array, " R"], Float[Array, "R O"]]

_MORE = 8
"""Vectors that are iterated beside those that are wanted."""

_EXACT = jax.lax.Precision.HIGHEST


def largest(w: Float[Array, "I O"], rank: int) -> Triple:
  """Returns (u, s, v) with `u s v` the best approximation of that rank.

  From the eigenvectors of the smaller Gram matrix, five times faster than a
  singular value decomposition here (576 x 1536). Where values decay, those of
  the Gram matrix are lost first, and a power iteration, which the decay makes
  fast, finds their vectors again.

  Args:
    w: fp32.
    rank: at most the smaller side.
  """
  if w.shape[0] > w.shape[1]:
    v, s, u = largest(w.T, rank)
    return u.T, s, v.T
  _, vectors = jnp.linalg.eigh(jnp.matmul(w, w.T, precision=_EXACT))
  u = vectors[:, ::-1][:, : rank + _MORE]
  for _ in range(2):
    v, _ = jnp.linalg.qr(jnp.matmul(w.T, u, precision=_EXACT))
    u, _ = jnp.linalg.qr(jnp.matmul(w, v, precision=_EXACT))
  inner = jnp.matmul(u.T, w, precision=_EXACT)
  turn, s, v = jnp.linalg.svd(inner, full_matrices=False)
  u = jnp.matmul(u, turn, precision=_EXACT)
  return u[:, :rank], s[:rank], v[:rank]


def smallest(w: Float[Array, "I O"], rank: int) -> Triple:
  """Returns the last `rank` singular triples, largest first."""
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  return u[:, -rank:], s[-rank:], v[-rank:]
