"""Low-rank views of gradients: which axis is projected, and onto what.

A gradient G [..., in, out] is seen as R through a projector P of rank r:

  side "in"    P [..., in, r]     R = Pᵀ G  [..., r, out]    back: P R
  side "out"   P [..., r, out]    R = G Pᵀ  [..., in, r]     back: R P

so that the axis that is kept stays in its place, and with it the mesh axis
that cuts it. Galore's names for weights stored [out, in]: its "right" is our
"in", its "left" our "out", "std" is "shorter", "reverse_std" is "longer".
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research.ranges import PositiveInt, Ranged
from research.typing import Array, Float, PRNGKey

Side = Literal["shorter", "longer", "in", "out"]
"""Which axis of a matrix is projected; of a square one, "shorter" is "in"."""

Basis = Callable[
  [Float[Array, "*B K N"], int, Float[Array, "*B K R"], PRNGKey],
  Float[Array, "*B K R"],
]
"""(gradient with the projected axis first, rank, last basis, key) -> basis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
  """The first left singular vectors, by a full decomposition.

  Zhao et al. 2024 (GaLore, arXiv:2403.03507), equation 12.
  """

  def __call__(
    self,
    g: Float[Array, "*B K N"],
    rank: int,
    last: Float[Array, "*B K R"],
    key: PRNGKey,
  ) -> Float[Array, "*B K R"]:
    """Returns an orthonormal basis of the `rank` strongest directions."""
    del last, key
    return jnp.linalg.svd(g, full_matrices=False)[0][..., :rank]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
  """About the same span, by a few products with the gradient.

  Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithm 4.4: random
  directions, then `iterations` times `q <- orthonormal(G Gᵀ q)`. The small
  matrix `qᵀ G Gᵀ q` tells how to turn q to the singular vectors.

  Attributes:
    iterations: products with `G Gᵀ`. The error falls as (s_{r+1} / s_r) to
      twice that power and one.
  """

  iterations: int = 2

  def __call__(
    self,
    g: Float[Array, "*B K N"],
    rank: int,
    last: Float[Array, "*B K R"],
    key: PRNGKey,
  ) -> Float[Array, "*B K R"]:
    """Returns an orthonormal basis of about the strongest directions."""
    del last
    start = jax.random.normal(key, (*g.shape[:-2], g.shape[-1], rank), g.dtype)
    q = jnp.linalg.qr(g @ start)[0]
    gt = jnp.swapaxes(g, -1, -2)
    for _ in range(self.iterations):
      q = jnp.linalg.qr(g @ jnp.linalg.qr(gt @ q)[0])[0]
    seen = gt @ q
    _, turn = jnp.linalg.eigh(jnp.swapaxes(seen, -1, -2) @ seen)
    return q @ turn[..., ::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
  """Random directions, N(0, 1 / r), whatever the gradient.

  Hao et al. 2024 (FLORA, arXiv:2402.03293) and Zhu et al. 2024 (APOLLO,
  arXiv:2412.05270): P Pᵀ is the identity in the mean.
  """

  def __call__(
    self,
    g: Float[Array, "*B K N"],
    rank: int,
    last: Float[Array, "*B K R"],
    key: PRNGKey,
  ) -> Float[Array, "*B K R"]:
    """Returns new random directions."""
    del last
    return jax.random.normal(key, (*g.shape[:-1], rank), g.dtype) / rank**0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Ranged):
  """How the gradients of matrices are projected.

  Attributes:
    rank: of the projected gradients; at most an axis's own size.
    every: updates between new projectors.
    side: which axis is projected.
    basis: what it is projected onto.
    seed: of random bases.
  """

  rank: PositiveInt
  every: PositiveInt = 200
  side: Side = "shorter"
  basis: Basis = Exact()
  seed: int = 0

  def projects_in(self, shape: tuple[int, ...]) -> bool:
    """Whether the axis `in` of such a matrix is projected, not `out`."""
    inputs, outputs = shape[-2:]
    shorter = inputs <= outputs
    return {
      "shorter": shorter,
      "longer": not shorter,
      "in": True,
      "out": False,
    }[self.side]

  def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the projector of such a matrix."""
    *lead, inputs, outputs = shape
    if self.projects_in(shape):
      return (*lead, inputs, min(self.rank, inputs))
    return (*lead, min(self.rank, outputs), outputs)

  def fresh(self, g: Any, last: Any, key: PRNGKey) -> Array:
    """Returns the projector of a gradient, in float32.

    Args:
      g: the gradient.
      last: the projector that this one takes the place of.
      key: of this matrix and this time.
    """
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    if self.projects_in(g.shape):
      return self.basis(g, last.shape[-1], last, key)
    turned, before = (jnp.swapaxes(x, -1, -2) for x in (g, last))
    found = self.basis(turned, last.shape[-2], before, key)
    return jnp.swapaxes(found, -1, -2)

  def down(self, g: Array, projector: Array) -> Array:
    """Returns R of a gradient."""
    if self.projects_in(g.shape):
      return jnp.swapaxes(projector, -1, -2) @ g
    return g @ jnp.swapaxes(projector, -1, -2)

  def up(self, small: Array, projector: Array, shape: tuple[int, ...]) -> Array:
    """Returns what R stands for, of a matrix of such a shape."""
    if self.projects_in(shape):
      return projector @ small
    return small @ projector

  def rank_axis(self, shape: tuple[int, ...]) -> int:
    """Returns which axis of R is the rank: -2 or -1."""
    return -2 if self.projects_in(shape) else -1
