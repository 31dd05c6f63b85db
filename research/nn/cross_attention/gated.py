"""Flamingo's gated cross-attention, which a model can begin without."""

import jax.numpy as jnp
from flax import linen as nn

from research import sharding, weights
from research.nn.attention import CrossAttention
from research.nn.cross_attention.media import Media
from research.nn.mlp import Mlp, PlainMlp
from research.nn.norm import LayerNorm, Norm
from research.typing import Array, Float


class GatedCrossAttention(nn.Module):
  """`y += tanh(a) attention(norm(y), media); y += tanh(b) mlp(norm(y))`.

  Alayrac et al. 2022, arXiv:2204.14198, section 2.2. Both gates start at 0, so
  that a pretrained language model computes at first what it did without.

  The images are the weight `media` of this layer (`nn.cross_attention.Media`).
  Without it the layer's attention adds nothing.

  Attributes:
    attention: of tokens over the images.
    mlp: the feed-forward.
    media_width: `C`, width of what is attended to.
    norm: normalises the input of both.
  """

  attention: CrossAttention
  mlp: Mlp | PlainMlp
  media_width: int
  norm: Norm = LayerNorm(eps=1e-5)

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the residual stream after this layer."""
    normed = self._norm("attention_norm", x)
    if self.is_initializing():
      self.attention(normed, jnp.zeros((x.shape[0], 1, self.media_width)))
    gate = self._gate("attention_gate", x)
    if self.has_variable("params", "media"):
      x = x + gate * self._attended(
        normed, self.get_variable("params", "media")
      )
    x = sharding.constrain(x, "batch", "length", None)
    y = self.mlp(self._norm("mlp_norm", x))
    x = x + self._gate("mlp_gate", x) * y
    return sharding.constrain(x, "batch", "length", None)

  def _attended(self, normed, media: Media):
    mask = media.mask(normed.shape[1])
    y = self.attention.attend_to(normed, media.keys, media.values, mask)
    # A bias of the output must not reach tokens that see nothing.
    some = mask.bounds[:, 1] > mask.bounds[:, 0]
    return jnp.where(some[..., None], y, 0)

  def _gate(self, name, x):
    gate = weights.weight(self, name, nn.initializers.zeros, ())
    return jnp.tanh(gate.astype(jnp.float32)).astype(x.dtype)

  def _norm(self, name, x):
    return self.norm.clone(name=name, parent=self)(x)
