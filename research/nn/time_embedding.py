"""A model that is told the time: sinusoids, an MLP, adaptive norms.

Peebles and Xie 2022 (DiT, arXiv:2212.09748) as MDLM (arXiv:2406.07524) and MD4
(arXiv:2406.04329) use it. With c = silu(MLP(sinusoids of the time)), and three
linear maps of c a sublayer,

  x + gate * f(norm(x) * (1 + scale) + shift)

and shift and scale for the last norm. Here gate is `1 + g`, and all three maps
start at zero: the model starts as the one that is not told. Their `gate = g`,
by which layers start as nothing, is a bias of -1 at the start (`closed`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.typing import Array, Float, UserError

PERIOD = 10_000.0
"""The ratio of the fastest sinusoid to a slowest one that is never reached."""

LOW = 1e-3
"""What MDLM's noise leaves clean at time 1: sigma stays finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
  """How a model is told the time; MDLM's sizes by default.

  Attributes:
    told: 'time', or 'sigma': MDLM's noise `-log(1 - (1 - 1e-3) t)`.
    scale: multiplies it; MD4 has 1,000 for the time.
    features: sinusoids, half of them cosines, of frequencies from 1 down to
      nearly 1e-4.
    hidden: of the MLP.
    width: C, of what layers are told.
    closed: whether layers start as nothing, as in DiT.
  """

  told: str = "sigma"
  scale: float = 1.0
  features: int = 256
  hidden: int = 128
  width: int = 128
  closed: bool = False

  def __post_init__(self):
    if self.features < 2 or self.features % 2:
      raise UserError(
        f"Clock.features: found {self.features}, expected an even number"
      )
    if self.hidden < 1 or self.width < 1 or not self.scale > 0:
      raise UserError(
        f"Clock: hidden is {self.hidden}, width {self.width} and scale"
        f" {self.scale}, expected more than 0"
      )
    if self.told not in ("time", "sigma"):
      raise UserError(
        f"Clock.told: found {self.told!r}, expected 'time' or 'sigma'"
      )

  def sinusoids(self, time: Float[Array, "*B"]) -> Float[Array, "*B F"]:
    """Returns cosines, then sines, of times in [0, 1]; fp32."""
    x = time.astype(jnp.float32)
    if self.told == "sigma":
      x = -jnp.log1p(-(1 - LOW) * x)
    half = self.features // 2
    rate = jnp.exp(-jnp.log(PERIOD) * jnp.arange(half) / half)
    angle = self.scale * x[..., None] * rate
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def missing() -> UserError:
  """Returns the error for a model that was not told the time."""
  return UserError(
    "this model is told the time (Sizes.clock): expected time, [B] or [B, T],"
    " found none; masked diffusion's objectives and samplers have one"
  )


class TimestepEmbedder(nn.Module):
  """`silu(MLP(sinusoids))`, what every layer is told.

  Attributes:
    clock: sizes.
  """

  clock: TimeEmbedding

  @nn.compact
  def __call__(
    self, time: Float[Array, "B #T"], dtype: str
  ) -> Float[Array, "B #T C"]:
    x = self.clock.sinusoids(time).astype(dtype)
    x = weights.project(self, x, "enter", self.clock.hidden, bias=True)
    x = weights.project(
      self, jax.nn.silu(x), "leave", self.clock.width, bias=True
    )
    return jax.nn.silu(x)


class AdaLN(nn.Module):
  """Linear maps of what a layer is told, zero at the start.

  Attributes:
    closed: whether the gate starts at 0 and not at 1.
    gated: whether there is a gate; without, shift and scale alone.
  """

  closed: bool = False
  gated: bool = True

  @nn.compact
  def __call__(
    self, told: Float[Array, "B #T C"] | None, width: int
  ) -> list[Float[Array, "B #T D"]]:
    """Returns shift, scale and, if there is one, `gate - 1`; fp32.

    Raises:
      UserError: nothing was told.
    """
    if told is None:
      raise missing()
    count = 3 if self.gated else 2

    def bias(key, shape):
      del key
      value = -1.0 if self.gated and self.closed else 0.0
      return jnp.zeros(shape).at[2 * width :].set(value)

    zeros = nn.initializers.zeros_init()
    w = weights.weight(self, "weight", zeros, (told.shape[-1], count * width))
    b = weights.weight(self, "weight_bias", bias, (count * width,))
    y = weights.einsum("...c,cd->...d", told, w).astype(jnp.float32)
    b = weights.bias_of(w, b)
    return jnp.split(y + b.astype(jnp.float32), count, axis=-1)


def modulated(
  x: Float[Array, "B T D"],
  shift: Float[Array, "B #T D"],
  scale: Float[Array, "B #T D"],
) -> Float[Array, "B T D"]:
  """Returns `x (1 + scale) + shift`, computed in fp32; of zeros: `x`."""
  return (x.astype(jnp.float32) * (1 + scale) + shift).astype(x.dtype)


def gated(
  y: Float[Array, "B T D"], gate: Float[Array, "B #T D"] | None
) -> Float[Array, "B T D"]:
  """Returns `y (1 + gate)`, computed in fp32; `y` where there is no gate."""
  if gate is None:
    return y
  return (y.astype(jnp.float32) * (1 + gate)).astype(y.dtype)
