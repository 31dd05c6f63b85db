"""HQQ: half-quadratic quantization, with optimised real-valued zero points.

Badri and Shaji 2023 ("Half-Quadratic Quantization of Large Machine Learning
Models"). A group's scale follows from its range. Its zero minimises
`Σ |w - w'|^p`, p < 1, which tolerates a few large errors, by half-quadratic
splitting: alternately shrinks errors towards zero and sets the zero to the best
mean. Needs no data. It reduces the error of weights; the model's error may
increase (at 3 bits).
"""

import dataclasses

import jax
import jax.numpy as jnp

from research.quant.formats.affine import Affine
from research.ranges import NonNegativeInt, PositiveShare
from research.typing import Array, Float, UserError

LIMIT = 2e4
"""Upper bound of the inverse scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQ(Affine):
  """A uniform grid with optimised float zeros.

  Attributes:
    steps: maximum number of iterations; they stop when the mean error of the
      matrix no longer decreases.
    norm: p.
    beta: weight of the quadratic term.
    growth: factor of beta per iteration; 1 in the authors' package (0.2.8).
  """

  zero: str = "float"
  steps: NonNegativeInt = 20
  norm: PositiveShare = 0.7
  beta: float = 10.0
  growth: float = 1.01

  def __post_init__(self):
    super().__post_init__()
    if self.symmetric or self.zero != "float":
      raise UserError("HQQ: expected symmetric=False and zero='float'.")

  @property
  def name(self) -> str:
    return f"hqq{self.bits}-g{self.block or 'all'}"

  @property
  def group_local(self) -> bool:
    return False  # all groups stop at the same step

  def grid(
    self, w: Float[Array, "*B S O"]
  ) -> tuple[Float[Array, "*B O"], Float[Array, "*B O"]]:
    """Returns (scale, zero) of groups of `S` weights, float32."""
    low, high = w.min(-2), w.max(-2)
    span = high - low
    inverse = jnp.where(span > 1e-4, self.top / jnp.maximum(span, 1e-30), 1.0)
    scale = self._stored(1 / jnp.minimum(inverse, LIMIT))
    zero = -low / scale
    if self.bits == 4:
      zero = jnp.round(zero)
    zero = self._minimised(w, scale, zero)
    return scale, zero.astype(self.scale_dtype).astype(jnp.float32)

  def _minimised(self, w, scale, zero):
    """Returns the zeros when the mean error stops decreasing."""
    wide = scale[..., None, :]

    def unfinished(state):
      i, _, _, going = state
      return going & (i < self.steps)

    def step(state):
      i, zero, least, _ = state
      codes = self.codes(w, scale, zero)
      apart = w - (codes - zero[..., None, :]) * wide
      size = jnp.abs(apart)
      beta = self.beta * self.growth ** i.astype(jnp.float32)
      # At an error of 0 the power is infinite, and the result is 0.
      shrunk = jnp.maximum(size - size ** (self.norm - 1) / beta, 0)
      kept = jnp.sign(apart) * shrunk
      zero = jnp.mean(codes - (w - kept) / wide, axis=-2)
      error = jnp.mean(size)
      return i + 1, zero, jnp.minimum(error, least), error < least

    start = (jnp.int32(0), zero, jnp.float32(1e4), jnp.bool(True))
    return jax.lax.while_loop(unfinished, step, start)[1]
