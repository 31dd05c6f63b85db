"""Combines attention over disjoint sets of keys into attention over all."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def combine(
  outputs: Sequence[Float[Array, "B T N Hv"]],
  lses: Sequence[Float[Array, "B N T"]],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Returns the output and log-sum-exp over the keys of all partial results.

  With w_k = exp(lse_k): o = sum_k w_k o_k / sum_k w_k, lse = log sum_k w_k
  (kernels_pallas/MATH.md 2.2), in any order and grouping. Differentiable in
  everything. A partial result without a visible key (lse_k = -inf) contributes
  nothing to values or gradients, whatever its output contains. A sink belongs
  to exactly one partial result.

  Args:
    outputs: Normalised output of each partial result.
    lses: Natural log-sum-exp of each.

  Returns:
    Both in the dtype of the log-sum-exps, promoted with the outputs'; 0 and
    -inf where no partial result saw a key.

  Raises:
    ValueError: No partial results, or unequal numbers of outputs and
      log-sum-exps.
  """
  if len(outputs) != len(lses) or not len(lses):
    raise ValueError(
      f"combine: found {len(outputs)} outputs and {len(lses)} log-sum-exps, "
      "expected one of each for every partial"
    )
  # The result does not depend on m.
  m = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
  m = jnp.where(m == -jnp.inf, 0, m)
  weights = [jnp.exp(lse - m) for lse in lses]
  total = sum(weights)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  parts = []
  for o, weight in zip(outputs, weights, strict=True):
    weight = jnp.swapaxes(weight / total, 1, 2)[..., None]
    # Zeroed before the product: 0 * NaN would reach the weight's gradient.
    parts.append(weight * jnp.where(weight == 0, 0, o))
  return sum(parts), jnp.where(empty, -jnp.inf, m + jnp.log(total))
