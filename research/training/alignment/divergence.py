"""Divergence of a policy from its reference, estimated from sampled tokens.

With `d = log reference(token) - log policy(token)` of a token that the policy
sampled, three estimates of KL(policy || reference) (Schulman 2020,
"Approximating KL divergence"): `k1 = -d` is unbiased and may be negative;
`k2 = d^2 / 2` has a little bias and little variance; `k3 = exp(d) - d - 1` is
unbiased and at least 0. Gradients are another matter, since sampling is not
differentiated: that of k2 is the divergence's, those of the others are not.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from research.ranges import NonNegativeFloat, Ranged
from research.typing import Array, Float

Estimate = Callable[[Float[Array, "B T"]], Float[Array, "B T"]]
"""Maps `d` of each token to an estimate of the divergence."""


def k1(d: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns `-d`: unbiased, of any sign."""
  return -d


def k2(d: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns `d^2 / 2`: its gradient is that of KL(policy || reference)."""
  return d**2 / 2


def k3(d: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns `exp(d) - d - 1`: unbiased, at least 0 (GRPO, equation 4)."""
  return jnp.exp(d) - d - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL(Ranged):
  """A penalty for leaving the reference.

  Attributes:
    beta: multiplies the estimate.
    estimate: `k1`, `k2` or `k3`.
  """

  beta: NonNegativeFloat = 0.04
  estimate: Estimate = k3
