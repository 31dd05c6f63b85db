"""The factor that GPTQ compensates errors by, and what to do without one.

For a Hessian `H` the rows of the upper Cholesky factor `U` of its inverse,
`H⁻¹ = Uᵀ U`, say how each row's rounding error is spread over the rows after it
(Frantar et al. 2022, arXiv:2210.17323, section 3.3). `U` is found without the
inverse: `H = R Rᵀ` with `R` upper triangular is the Cholesky factorization from
the last row up, and `U = R⁻¹`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float

DOUBLINGS = 8
"""Dampings after the first, of which each is at least 0.01."""

FLOORS = tuple(1e-6 * 10.0**k for k in range(7))
"""Least diagonals, of the largest one, after the last damping has failed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Damping:
  """What a Hessian took to be factored; arrays, one entry a matrix.

  Attributes:
    damp: share of the mean diagonal that was added to the diagonal.
    floor: share of the largest that the diagonal was raised to, 0 for none.
    attempts: factorizations until one succeeded.
    failed: whether none did, and errors are not compensated.
  """

  damp: Any
  floor: Any
  attempts: Any
  failed: Any


def ladder(damp: Float[Array, ""]) -> Float[Array, "A 2"]:
  """Returns the (damp, floor) that are tried in turn."""
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


def enough(
  damp: float, tokens: Float[Array, ""], inputs: int
) -> Float[Array, ""]:
  """Returns a damping for a Hessian of so many tokens.

  Fewer than inputs leave it singular: then `(inputs / tokens)² / 4`, which on
  random problems is about the best from a half down to an eighth, and no worse
  than rounding alone, as less of it is.
  """
  few = (inputs / jnp.maximum(tokens, 1)) ** 2 / 4
  return jnp.where(tokens < inputs, jnp.maximum(damp, few), damp)


def inverse_factor(
  h: Float[Array, "I I"], damp: float | Float[Array, ""]
) -> tuple[Float[Array, "I I"], Damping]:
  """Returns `U`, upper triangular, with `Uᵀ U` the inverse of the damped `h`.

  Args:
    h: symmetric, its diagonal above 0 if it is to be of use.
    damp: what is tried first; a failure takes twice as much, then a floor
      under the diagonal, then the identity: rounding alone.
  """
  steps = ladder(jnp.asarray(damp, h.dtype))
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
