"""One vector per image: by the class token, or by attention."""

import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import weights
from research.nn.attention import CrossAttention
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm, Norm
from research.typing import Array, Bool, Float


class ClassPooling(nn.Module):
  """CLIP's: the normalised class token, projected without a bias.

  Attributes:
    size: of the result, `E`.
  """

  size: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], norm: Norm
  ) -> Float[Array, "B E"]:
    """Returns `[B, E]`.

    Args:
      x: the last layer's output, the class token first.
      valid: which tokens are part of the image.
    """
    del valid
    return weights.project(self, norm(x[:, 0]), "projection", self.size)


class AttentionPooling(nn.Module):
  """SigLIP's multi-head attention pooling: a learned query over all patches.

  `y = attention(probe, x); y + mlp(norm(y))` (Zhai et al. 2022, "Scaling Vision
  Transformers", section 3.2).
  """

  heads: int
  mlp: PlainMlp
  norm: LayerNorm = LayerNorm()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"], norm: Norm
  ) -> Float[Array, "B D"]:
    """Returns `[B, D]`; arguments as for `ClassPooling`."""
    x, width = norm(x), x.shape[-1]
    init = nn.initializers.xavier_uniform()
    probe = weights.weight(self, "probe", init, (1, width)).astype(x.dtype)
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, width))
    attention = CrossAttention(
      heads=self.heads,
      head_dim=width // self.heads,
      qkv_bias=True,
      out_bias=True,
      name="attention",
    )
    segments = jnp.zeros((x.shape[0], 1), jnp.int32), jnp.where(valid, 0, -1)
    y = attention(probe, x, Mask.full(segments=segments))
    return (y + self.mlp(self.norm(y)))[:, 0]


Pooling = ClassPooling | AttentionPooling
