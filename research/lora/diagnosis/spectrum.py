"""The singular triples of a matrix: all, the largest, or the smallest.

`decompose` is NumPy's, in fp64; the others are JAX's, in fp32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from research.typing import Array, Float

Triple = tuple[Float[Array, "I R"], Float[Array, " R"], Float[Array, "R O"]]

_MORE = 8
"""Oversampling: extra vectors in the subspace iteration."""

_EXACT = jax.lax.Precision.HIGHEST

_LOST = 1e-6
"""Share of the largest singular value below which a Gram matrix in fp64 has no
vectors: it has the squares, and rounds them to 1e-16."""


def decompose(
  w: Float[np.ndarray, "I O"], rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (u, s, v) with `w = u diag(s) v`, in fp64, largest value first.

  Computed from eigenvectors of the smaller Gram matrix, several times faster
  than an SVD of fp32, and more accurate where values are large. Triples of less
  than 1e-6 of the largest value are left out, as those of a null space are.

  Args:
    rank: how many triples at most; None for all.
  """
  w = w.astype(np.float64)
  if w.shape[0] > w.shape[1]:
    v, s, u = decompose(w.T, rank)
    return u.T, s, v.T
  size = len(w)
  some = None if rank is None else (max(size - rank, 0), size - 1)
  squares, vectors = scipy.linalg.eigh(
    w @ w.T, subset_by_index=some, driver="evd" if some is None else "evr"
  )
  s, u = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
  kept = s > _LOST * s[0]
  s, u = s[kept], u[:, kept]
  return u, s, (u.T @ w) / s[:, None]


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
