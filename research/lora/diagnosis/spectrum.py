"""The largest or smallest singular triples of a matrix."""

import jax
import jax.numpy as jnp

from research.typing import Array, Float

Triple = tuple[Float[Array, "I R"], Float[Array, " R"], Float[Array, "R O"]]

_MORE = 8
"""Oversampling: extra vectors in the subspace iteration."""

_EXACT = jax.lax.Precision.HIGHEST


def largest(w: Float[Array, "I O"], rank: int) -> Triple:
  """Returns (u, s, v) with `u diag(s) v` the best approximation of that rank.

  Starts from eigenvectors of the smaller Gram matrix, five times faster than
  an SVD (576 x 1536 on CPU). The Gram matrix squares the singular values, so
  small ones lose precision first; two subspace iterations, which converge fast
  where values decay, recover their vectors.

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
  """Returns the `rank` smallest singular triples, in descending order."""
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  return u[:, -rank:], s[-rank:], v[-rank:]
