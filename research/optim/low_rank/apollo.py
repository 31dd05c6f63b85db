"""APOLLO and Fira: full-rank updates, sized by moments of low rank.

Both keep Adam's moments of projected gradients R (see `subspace`), as GaLore
does. With N what the moments make of R, and norms along the rank's axis,

  f = |N| / |R|            one number for each row, or column, that is kept
  apollo:  u = sqrt(scale) limit(f G)
  fira:    u = scale P N + limit(f (G - scale P R))

and `w <- w - rate (c u + decay w)`, c being Adam's corrections of its bias.
`limit` keeps the norm of a matrix's update from growing by more than 1% in a
step. Zhu et al. 2024 (arXiv:2412.05270), algorithm 1; APOLLO-Mini has rank 1
and a single f for a matrix (`whole`). Chen et al. 2024 (Fira,
arXiv:2410.01623), equations 6 to 9; as in its authors' code, `scale` also
stands before P R.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import ranges, tree
from research.optim import muon, optim
from research.optim.low_rank import projected
from research.optim.low_rank.subspace import Projection
from research.typing import Array, Float

GROWTH = 1.01
"""Bound of a norm's growth in a step (Fira, section 4.2)."""


class LowRankState(NamedTuple):
  """Updates done, projectors, moments, and norms of the last updates."""

  count: Array
  projector: Any
  mu: Any
  nu: Any
  norm: Any


Factor = Callable[[Array, Array, int], Array]
"""(N, R, axis of the rank) -> f, to be multiplied with G."""


def channel(
  normed: Float[Array, "..."], small: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
  """Returns a factor for each row or column that the projection keeps."""
  return _ratio(normed, small, axis)


def whole(
  normed: Float[Array, "..."], small: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
  """Returns one factor for each matrix."""
  del axis
  return _ratio(normed, small, (-2, -1))


def _ratio(normed, small, axis):
  one, other = (
    jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (normed, small)
  )
  return one / (other + 1e-8)


def limit(
  x: Float[Array, "*B I O"], last: Float[Array, "*B"]
) -> tuple[Float[Array, "*B I O"], Float[Array, "*B"]]:
  """Returns `x`, made shorter where it grew too fast, and its norm.

  Args:
    x: an update of matrices.
    last: norms of the updates before; 0 if there were none.
  """
  norm = jnp.linalg.norm(x, axis=(-2, -1))
  growth = jnp.maximum(norm / (last + 1e-8), GROWTH) / GROWTH
  growth = jnp.where(last > 0, growth, 1)
  return x / growth[..., None, None], norm / growth


Direction = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]
"""(G, R, N, P, last norm) -> (u, norm)."""


def scale_by_low_rank(
  direction: Direction,
  projection: Projection,
  *,
  matrices: str = muon.MATRICES,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-6,
) -> optax.GradientTransformation:
  """Returns the transformation `G -> c u`.

  Args:
    direction: how u is made.
    projection: how, and how often, matrices are projected.
    matrices: regular expression of the paths of what is projected; all else
      moves by Adam.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square before its bias is corrected.
  """
  ranges.check("optimizer", ranges.Decay, b1=b1, b2=b2)
  ranges.check("optimizer", ranges.NonNegativeFloat, eps=eps)

  def init(params):
    projectors = projected.zeros(projection, matrices, params)
    small = projected.shrunk(projection, params, projectors)
    found = dict(tree.flatten_paths(params))
    norms = tree.map_paths(
      lambda path, x: jnp.zeros(found[path].shape[:-2], x.dtype), projectors
    )
    mu, nu = (jax.tree.map(jnp.zeros_like, small) for _ in range(2))
    return LowRankState(jnp.zeros((), jnp.int32), projectors, mu, nu, norms)

  def update(updates, state, params=None):
    del params
    projectors = jax.lax.cond(
      state.count % projection.every == 0,
      lambda: projected.renewed(
        projection, updates, state.projector, state.count
      ),
      lambda: state.projector,
    )
    small = projected.shrunk(projection, updates, projectors)
    mu = optax.tree.update_moment(small, state.mu, b1, 1)
    nu = optax.tree.update_moment(small, state.nu, b2, 2)
    count = optax.safe_increment(state.count)
    correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    normed = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    r, n, p, last = (
      dict(tree.flatten_paths(x))
      for x in (small, normed, projectors, state.norm)
    )
    norms = {}

    def one(path, g):
      u = n[path]
      if path in p:
        wide = g.astype(p[path].dtype)
        u, norms[path] = direction(wide, r[path], u, p[path], last[path])
      return (correction * u).astype(g.dtype)

    moved = tree.map_paths(one, updates)
    norm = tree.map_paths(lambda path, _: norms[path], state.norm)
    return moved, LowRankState(count, projectors, mu, nu, norm)

  return optax.GradientTransformation(init, update)


def apollo(
  learning_rate: optim.Number | optim.Schedule,
  projection: Projection,
  *,
  factor: Factor = channel,
  scale: optim.Number = 1.0,
  matrices: str = muon.MATRICES,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-6,
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = None,
) -> optax.GradientTransformation:
  """Returns APOLLO.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    projection: as published, `Gaussian` with a quarter of the width as rank;
      rank 1 for APOLLO-Mini.
    factor: `channel`, or `whole` for APOLLO-Mini.
    scale: as published 1, and 128 for APOLLO-Mini.
    matrices: regular expression of the paths of what is projected.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: see `scale_by_low_rank`.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the gradient's global norm, or None.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, scale=scale)

  def direction(g, small, normed, projector, last):
    del projector
    f = factor(normed, small, projection.rank_axis(g.shape))
    u, norm = limit(g * f, last)
    return scale**0.5 * u, norm

  return _finished(
    learning_rate,
    scale_by_low_rank(
      direction, projection, matrices=matrices, b1=b1, b2=b2, eps=eps
    ),
    weight_decay,
    clip,
  )


def fira(
  learning_rate: optim.Number | optim.Schedule,
  projection: Projection,
  *,
  factor: Factor = channel,
  scale: optim.Number = 0.25,
  matrices: str = muon.MATRICES,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-6,
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = None,
) -> optax.GradientTransformation:
  """Returns Fira.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    projection: as published, `Exact`, every 200 updates.
    factor: `channel`, or `whole` for one number a matrix.
    scale: of what comes from the subspace.
    matrices: regular expression of the paths of what is projected.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: see `scale_by_low_rank`.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the gradient's global norm, or None.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, scale=scale)

  def direction(g, small, normed, projector, last):
    def up(x):
      return scale * projection.up(x, projector, g.shape)

    f = factor(normed, small, projection.rank_axis(g.shape))
    rest, norm = limit((g - up(small)) * f, last)
    return up(normed) + rest, norm

  return _finished(
    learning_rate,
    scale_by_low_rank(
      direction, projection, matrices=matrices, b1=b1, b2=b2, eps=eps
    ),
    weight_decay,
    clip,
  )


def _finished(learning_rate, moments, weight_decay, clip):
  return optax.chain(
    optim.clipped(clip),
    moments,
    optim.decaying(weight_decay),
    optim.scale_by_rate(learning_rate),
  )
