"""Damped Cholesky factor of the inverse Hessian, for GPTQ.

For a Hessian `H` the rows of the upper Cholesky factor `U` of its inverse,
`H⁻¹ = Uᵀ U`, determine how each row's rounding error is distributed to later
rows (Frantar et al. 2022, arXiv:2210.17323, section 3.3). `U` is computed
without the inverse: `H = R Rᵀ` with upper triangular `R` is a Cholesky
factorization from the last row up, and `U = R⁻¹`. If the factorization fails,
it is repeated with more damping.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float

DOUBLINGS = 8
"""Number of attempts with doubled damping, from at least 0.01."""

FLOORS = tuple(1e-6 * 10.0**k for k in range(7))
"""Minimum diagonals relative to the largest, tried after the last damping."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Damping:
  """Damping with which a Hessian was factored; arrays, one entry per matrix.

  Attributes:
    damp: share of the mean diagonal that was added to the diagonal.
    floor: minimum of the diagonal, as a share of its largest entry; 0 for none.
    attempts: number of factorizations.
    failed: whether all failed, so that errors are not compensated.
  """

  damp: Any
  floor: Any
  attempts: Any
  failed: Any


def damping_attempts(damp: Float[Array, ""]) -> Float[Array, "A 2"]:
  """Returns the (damp, floor) of successive attempts."""
  more = jnp.maximum(2 * damp, 0.01) * 2.0 ** np.arange(DOUBLINGS)
  damps = jnp.concatenate([damp[None], more])
  last = jnp.broadcast_to(damps[-1:], (len(FLOORS),))
  return jnp.stack(
    [
      jnp.concatenate([damps, last]),
      jnp.concatenate([jnp.zeros_like(damps), jnp.asarray(FLOORS, damp.dtype)]),
    ],
    axis=-1,
  )


def damping_for_tokens(
  damp: float, tokens: Float[Array, ""], inputs: int
) -> Float[Array, ""]:
  """Returns the damping for a Hessian of a number of tokens.

  With fewer tokens than inputs the Hessian is singular. The damping is then at
  least `(inputs / tokens)² / 4`: on random problems with tokens / inputs from
  1/2 to 1/8 this is about optimal, and less damping can be worse than rounding
  to nearest.
  """
  few = (inputs / jnp.maximum(tokens, 1)) ** 2 / 4
  return jnp.where(tokens < inputs, jnp.maximum(damp, few), damp)


def inverse_factor(
  h: Float[Array, "I I"], damp: float | Float[Array, ""]
) -> tuple[Float[Array, "I I"], Damping]:
  """Returns upper triangular `U` with `Uᵀ U` the inverse of the damped `h`.

  Args:
    h: symmetric, with a positive diagonal.
    damp: first damping. After failures it is doubled, then a minimum of the
      diagonal is added, and at last U is the identity, which means rounding to
      nearest.

  Returns:
    (`U`, the damping used).
  """
  steps = damping_attempts(jnp.asarray(damp, h.dtype))
  diagonal = jnp.diagonal(h)
  mean, most = diagonal.mean(), abs(diagonal).max()
  eye = jnp.eye(len(h), dtype=h.dtype)

  def attempt(state):
    i, _, _ = state
    raised = jnp.maximum(diagonal + steps[i, 0] * mean, steps[i, 1] * most)
    damped = jnp.where(eye > 0, raised, h)
    lower = jax.lax.linalg.cholesky(damped[::-1, ::-1])
    return i + 1, lower, jnp.isfinite(lower).all()

  def unfinished(state):
    i, _, done = state
    return ~done & (i < len(steps))

  start = (jnp.int32(0), eye, jnp.bool(False))
  tried, lower, done = jax.lax.while_loop(unfinished, attempt, start)
  found = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
  found = jnp.where(done, found[::-1, ::-1], eye)
  used = steps[tried - 1]
  return found, Damping(used[0], used[1], tried, ~done)
