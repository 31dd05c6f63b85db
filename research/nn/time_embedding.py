"""Timestep conditioning: sinusoidal embedding, MLP and adaptive layer norm.

DiT (Peebles and Xie 2022, arXiv:2212.09748) as used in MDLM (arXiv:2406.07524)
and MD4 (arXiv:2406.04329). With c = silu(MLP(sinusoids of the timestep)), and
three linear maps of c per sublayer,

  x + gate * f(norm(x) * (1 + scale) + shift)

The final norm has shift and scale only. Here the gate is `1 + g`, and all three
maps are initialised to zero, so the model starts out equal to one without time
conditioning. DiT's adaLN-Zero, `gate = g`, in which every layer starts as the
identity, is obtained by initialising the bias of g to -1 (`zero_gate`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.ranges import OneOf, PositiveFloat, PositiveInt, Ranged, Whole
from research.typing import Array, Float, UserError

MAX_PERIOD = 10_000.0
"""Frequencies fall from 1 towards `1 / MAX_PERIOD`, which is not reached."""

SIGMA_EPS = 1e-3
"""Share of clean tokens at time 1 in MDLM's noise, which keeps sigma finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeEmbedding(Ranged):
  """Configuration of the timestep conditioning; defaults are MDLM's sizes.

  Attributes:
    input: what the sinusoids encode: 'time', the timestep t itself, or 'sigma',
      MDLM's noise level `-log(1 - (1 - 1e-3) t)`.
    scale: multiplies that input; MD4 uses 1,000 with 'time'.
    features: number of sinusoids, half of them cosines, with frequencies from 1
      down to nearly 1e-4.
    hidden: width of the MLP.
    width: C, the width of the conditioning vector.
    zero_gate: whether every layer starts as the identity (DiT's adaLN-Zero).
  """

  input: OneOf("time", "sigma") = "sigma"
  scale: PositiveFloat = 1.0
  features: Whole(at_least=2, multiple=2) = 256
  hidden: PositiveInt = 128
  width: PositiveInt = 128
  zero_gate: bool = False

  def sinusoids(self, time: Float[Array, "*B"]) -> Float[Array, "*B F"]:
    """Returns cosines, then sines, of timesteps in [0, 1]; fp32."""
    x = time.astype(jnp.float32)
    if self.input == "sigma":
      x = -jnp.log1p(-(1 - SIGMA_EPS) * x)
    half = self.features // 2
    rate = jnp.exp(-jnp.log(MAX_PERIOD) * jnp.arange(half) / half)
    angle = self.scale * x[..., None] * rate
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def missing_time() -> UserError:
  """Returns the error for a time-conditioned model called without a time."""
  return UserError(
    "this model is conditioned on the time (Sizes.time_embedding): expected"
    " time, [B] or [B, T], found none; masked diffusion's objectives and"
    " samplers pass one"
  )


class TimestepEmbedder(nn.Module):
  """Computes conditioning vectors from timesteps: `silu(MLP(sinusoids))`.

  Attributes:
    config: sizes.
  """

  config: TimeEmbedding

  @nn.compact
  def __call__(
    self, time: Float[Array, "B #T"], dtype: str
  ) -> Float[Array, "B #T C"]:
    x = self.config.sinusoids(time).astype(dtype)
    x = weights.project(self, x, "enter", self.config.hidden, bias=True)
    x = weights.project(
      self, jax.nn.silu(x), "leave", self.config.width, bias=True
    )
    return jax.nn.silu(x)


class AdaLN(nn.Module):
  """Adaptive layer norm: linear maps from conditioning to shift, scale, gate.

  All maps are initialised to zero.

  Attributes:
    zero_gate: whether the gate starts at 0 (adaLN-Zero) instead of 1.
    gated: whether there is a gate; else only shift and scale.
  """

  zero_gate: bool = False
  gated: bool = True

  @nn.compact
  def __call__(
    self, conditioning: Float[Array, "B #T C"] | None, width: int
  ) -> list[Float[Array, "B #T D"]]:
    """Returns shift, scale and, if gated, `gate - 1`, in fp32.

    Args:
      conditioning: from `TimestepEmbedder`, one vector per row or per token.
      width: D, of the activations.

    Raises:
      UserError: there is no conditioning.
    """
    if conditioning is None:
      raise missing_time()
    count = 3 if self.gated else 2

    def bias(key, shape):
      del key
      value = -1.0 if self.gated and self.zero_gate else 0.0
      return jnp.zeros(shape).at[2 * width :].set(value)

    zeros = nn.initializers.zeros_init()
    shape = (conditioning.shape[-1], count * width)
    w = weights.weight(self, "weight", zeros, shape)
    b = weights.weight(self, "weight_bias", bias, (count * width,))
    y = weights.einsum("...c,cd->...d", conditioning, w).astype(jnp.float32)
    b = weights.scaled_bias(w, b)
    return jnp.split(y + b.astype(jnp.float32), count, axis=-1)


def modulate(
  x: Float[Array, "B T D"],
  shift: Float[Array, "B #T D"],
  scale: Float[Array, "B #T D"],
) -> Float[Array, "B T D"]:
  """Returns `x (1 + scale) + shift`, computed in fp32."""
  return (x.astype(jnp.float32) * (1 + scale) + shift).astype(x.dtype)


def apply_gate(
  y: Float[Array, "B T D"], gate: Float[Array, "B #T D"] | None
) -> Float[Array, "B T D"]:
  """Returns `y (1 + gate)`, computed in fp32; `y` if `gate` is None."""
  if gate is None:
    return y
  return (y.astype(jnp.float32) * (1 + gate)).astype(y.dtype)
