"""Two towers in one space: CLIP and SigLIP."""

import math

import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.nn.block import Block
from research.typing import Array, Float, Int
from research.vlm.encoders.text import TextEncoder
from research.vlm.encoders.vit import VisionTransformer


class DualEncoder(nn.Module):
  """An image tower and a text tower, with the scale of their products.

  Parameters: `image`, `text`, `logit_scale` (stored as its logarithm) and, for
  the sigmoid loss, `logit_bias`.

  Attributes:
    image: whose pooled vectors are compared.
    text: to those of texts.
    scale: initial scale of the products: CLIP's is 1 / 0.07, SigLIP's is 10.
    bias: initial bias of the sigmoid loss; None for none.
  """

  image: VisionTransformer
  text: TextEncoder
  scale: float = 1 / 0.07
  bias: float | None = None

  @property
  def max_positions(self) -> int:
    return self.text.length

  def layer_kinds(self) -> tuple[Block, ...]:
    return (*self.image.layer_kinds(), *self.text.layer_kinds())

  @nn.compact
  def __call__(
    self,
    patches: Float[Array, "B N X"],
    coordinates: Int[Array, "B N 2"],
    tokens: Int[Array, "C T"],
  ) -> tuple[Float[Array, "B E"], Float[Array, "C E"], Array, Array]:
    """Returns unit vectors of images and texts, the scale, and the bias.

    Args:
      patches, coordinates: as for `VisionTransformer`.
      tokens: of the texts.
    """
    images = self.image.pooled(patches, coordinates)
    texts = self.text(tokens)
    scale, bias = self._scale()
    return unit(images), unit(texts), scale, bias

  @nn.compact
  def embed_images(
    self, patches: Float[Array, "B N X"], coordinates: Int[Array, "B N 2"]
  ) -> Float[Array, "B E"]:
    """Returns the images' unit vectors; arguments as for `__call__`."""
    return unit(self.image.pooled(patches, coordinates))

  @nn.compact
  def embed_texts(self, tokens: Int[Array, "C T"]) -> Float[Array, "C E"]:
    return unit(self.text(tokens))

  def _scale(self):
    start = nn.initializers.constant(math.log(self.scale))
    scale = jnp.exp(weights.weight(self, "logit_scale", start, ()))
    if self.bias is None:
      return scale, jnp.zeros(())
    start = nn.initializers.constant(self.bias)
    return scale, weights.weight(self, "logit_bias", start, ())


def unit(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
  """Returns vectors of length 1, in fp32."""
  wide = x.astype(jnp.float32)
  return wide / (jnp.linalg.norm(wide, axis=-1, keepdims=True) + 1e-8)
