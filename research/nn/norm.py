"""Layer norms: RMSNorm of decoders, LayerNorm of most encoders."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.typing import Array, Float


class RMSNorm(nn.Module):
  """`x / rms(x) * (offset + scale)` over the last axis, computed in fp32.

  Zhang and Sennrich 2019, arXiv:1910.07467.

  Attributes:
    eps: added to the mean square.
    offset: 0 for the Llama family; 1 for Gemma, which stores `scale - 1` and
      multiplies before casting back.
  """

  eps: float = 1e-5
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    start = nn.initializers.constant(1.0 - self.offset)
    scale = weights.weight(self, "scale", start, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean + self.eps)
    scale = self.offset + scale.astype(jnp.float32)
    return (normed * scale).astype(x.dtype)


class UnitRMS(nn.Module):
  """`x / rms(x)` over the last axis, in fp32, without learned factors.

  Attributes:
    eps: added to the mean square.
  """

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)


class LayerNorm(nn.Module):
  """`(x - mean(x)) / std(x) * scale + bias` over the last axis, in fp32.

  Ba et al. 2016, arXiv:1607.06450.

  Attributes:
    eps: added to the variance.
  """

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = weights.weight(self, "scale", ones, (x.shape[-1],))
    bias = weights.weight(self, "bias", zeros, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + self.eps)
    y = normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class LayerScale(nn.Module):
  """`x * scale`: learned factors of a sublayer's output.

  Touvron et al. 2021, arXiv:2103.17239. It stands where other models have a
  norm after the sublayer.

  Attributes:
    start: the factors of a new model.
  """

  start: float = 0.1

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    start = nn.initializers.constant(self.start)
    scale = weights.weight(self, "scale", start, (x.shape[-1],))
    return x * scale.astype(x.dtype)


class LayerScalar(nn.Module):
  """`x * scale`: one learned factor of a layer's whole output (Gemma 4)."""

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    scale = weights.weight(self, "scale", nn.initializers.ones, (1,))
    return x * scale.astype(x.dtype)


Norm = RMSNorm | LayerNorm
