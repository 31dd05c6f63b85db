"""Noise schedules: how likely a token is still clean at time t.

Time runs from 0, where all is clean, to 1, where all is masked. A schedule is
`alpha(t)`, falling from about 1 to about 0; a token is masked with probability
`1 - alpha(t)`. The bound on -log p(x) that all masked diffusion shares weighs
a masked token's cross-entropy by `-alpha'(t) / (1 - alpha(t))`, which is `1/t`
for the linear one (Sahoo et al. 2024, arXiv:2406.07524; Shi et al. 2024,
arXiv:2406.04329), and the bound itself is the same for all of them.
"""

import dataclasses

import jax.numpy as jnp

from research.ranges import NonNegativeFloat, PositiveFloat, Ranged
from research.typing import Array, Float, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Ranged):
  """A schedule; subclasses say `noise`, its slope and its inverse.

    1 - alpha(t) = (1 - low - high) noise(t) + high

  Attributes:
    low: alpha at t = 1.
    high: 1 - alpha at t = 0; keeps the weight finite.
  """

  low: NonNegativeFloat = 0.0
  high: NonNegativeFloat = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.low + self.high >= 1:
      raise UserError(
        f"{type(self).__name__}: low is {self.low} and high {self.high},"
        " expected a sum below 1"
      )

  def noise(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns a function that rises from 0 at t = 0 to 1 at t = 1."""
    raise NotImplementedError

  def noise_slope(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns its derivative."""
    raise NotImplementedError

  def noise_time(self, noise: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns when `noise` has a value; inverts it."""
    raise NotImplementedError

  def masked(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns how likely a token is masked, `1 - alpha`."""
    return (1 - self.low - self.high) * self.noise(t) + self.high

  def alpha(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns how likely a token is clean."""
    return 1 - self.masked(t)

  def time(self, masked: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns when so many are masked; inverts `masked`, ends beyond it."""
    noise = (masked - self.high) / (1 - self.low - self.high)
    return self.noise_time(jnp.clip(noise, 0, 1))

  def slope(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns `alpha'(t)`, at most 0."""
    return -(1 - self.low - self.high) * self.noise_slope(t)

  def weight(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns `-alpha'(t) / (1 - alpha(t))`, what a masked token counts."""
    return -self.slope(t) / self.masked(t)

  def largest_sigma(
    self, t: Float[Array, ""], s: Float[Array, ""]
  ) -> Float[Array, ""]:
    """Returns the most that may be masked again, `(1 - alpha_s) / alpha_t`."""
    alpha = self.alpha(t)
    most = self.masked(s) / jnp.maximum(alpha, 1e-12)
    return jnp.where(alpha > 0, jnp.minimum(1.0, most), 1.0)

  def transition_probabilities(
    self, t: Float[Array, ""], s: Float[Array, ""], sigma: Float[Array, "*B"]
  ) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns (filled, masked): what becomes of a masked place from t to s."""
    fill = self.alpha(s) - (1 - sigma) * self.alpha(t)
    fill = jnp.clip(fill / self.masked(t), 0, 1)
    return fill, 1 - fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
  """`alpha = 1 - t`. With `high = 1e-3` LLaDA's, masked `(1 - e) t + e`.

  MDLM's log-linear schedule is `low = 1e-3`: its noise `-log(1 - (1 - e) t)`
  masks `(1 - e) t`.
  """

  def noise(self, t):
    return t

  def noise_slope(self, t):
    return jnp.ones_like(t)

  def noise_time(self, noise):
    return noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
  """`alpha = 1 - cos(pi/2 (1 - t))` (MD4), whose weight vanishes at t = 1."""

  def noise(self, t):
    return jnp.sin(jnp.pi / 2 * t)

  def noise_slope(self, t):
    return jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t)

  def noise_time(self, noise):
    return jnp.arcsin(noise) * 2 / jnp.pi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(Schedule):
  """`alpha = 1 - t ** power` (MD4's polynomial).

  Attributes:
    power: more than 0.
  """

  power: PositiveFloat = 2.0

  def noise(self, t):
    return t**self.power

  def noise_slope(self, t):
    return self.power * t ** (self.power - 1)

  def noise_time(self, noise):
    return noise ** (1 / self.power)
