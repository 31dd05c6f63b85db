"""A Q-Former with texts: what its three objectives compare."""

import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.nn.mlp import ACTIVATIONS
from research.nn.norm import LayerNorm
from research.typing import Array, Bool, Float, Int, UserError
from research.vlm.bootstrapping import masks
from research.vlm.connectors.qformer import QFormer
from research.vlm.contrastive.dual_encoder import unit


class CaptionHead(nn.Module):
  """BERT's: a layer, then the transposed embeddings and a bias.

  Attributes:
    norm: after the layer.
  """

  norm: LayerNorm = LayerNorm(eps=1e-12)

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T W"], table: weights.AnyWeight
  ) -> Float[Array, "B T V"]:
    """Returns logits in fp32; `table` is the embedding, `[V, W]`."""
    y = weights.project(self, x, "projection", x.shape[-1], True)
    y = self.norm(ACTIVATIONS["gelu"](y))
    y = weights.einsum("...d,vd->...v", y, table).astype(jnp.float32)
    zeros = nn.initializers.zeros
    return y + weights.weight(self, "bias", zeros, y.shape[-1:])


class ImageTextModel(nn.Module):
  """A Q-Former that reads texts, and what compares them with images.

  Attributes:
    qformer: takes texts.
    vocab_size: `V`, of the texts.
    length: most tokens of a text.
    size: width of the space in which vectors are compared, `E`.
    temperature: initial divisor of their products.
    caption: head of the captioning objective, or None.
    caption_start: id that takes the place of a text's first token when the text
      is to be predicted, or None to leave it.
  """

  qformer: QFormer
  vocab_size: int
  length: int
  size: int = 256
  temperature: float = 0.07
  caption: CaptionHead | None = CaptionHead()
  caption_start: int | None = None

  @nn.compact
  def __call__(
    self,
    features: Float[Array, "B N C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
  ) -> tuple[Array, Array, Array, Array, Array | None]:
    """Returns `vectors`, `match` and `captions` of pairs; makes all weights."""
    images, texts, temperature = self.vectors(features, tokens, valid)
    match = self.match(features, tokens, valid)
    if self.caption is None:
      return images, texts, temperature, match, None
    captions = self.captions(features, tokens, valid)
    return images, texts, temperature, match, captions

  @nn.compact
  def vectors(
    self,
    features: Float[Array, "B N C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
  ) -> tuple[Float[Array, "B Q E"], Float[Array, "B E"], Float[Array, ""]]:
    """Returns unit vectors of queries and of texts, and the temperature.

    A text's vector is that of its first token.

    Args:
      features: of the images, from an encoder.
      tokens: of the texts.
      valid: which of them are not padding.
    """
    mask = masks.unimodal(valid, self.qformer.queries)
    x, text = self._encode(features, tokens, mask)
    images = weights.project(self, x, "image_projection", self.size, True)
    texts = weights.project(
      self, text[:, 0], "text_projection", self.size, True
    )
    start = nn.initializers.constant(self.temperature)
    temperature = weights.weight(self, "temperature", start, ())
    return unit(images), unit(texts), temperature

  @nn.compact
  def match(
    self,
    features: Float[Array, "B N C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
  ) -> Float[Array, "B 2"]:
    """Returns the logits of no and yes; arguments as for `vectors`."""
    mask = masks.bidirectional(valid, self.qformer.queries)
    x, _ = self._encode(features, tokens, mask)
    logits = weights.project(self, x, "match_projection", 2, True)
    return logits.astype(jnp.float32).mean(axis=1)

  @nn.compact
  def captions(
    self,
    features: Float[Array, "B N C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
  ) -> Float[Array, "B T V"]:
    """Returns each token's logits of the next; arguments as for `vectors`.

    Raises:
      UserError: the model has no caption head.
    """
    if self.caption is None:
      raise UserError(
        "captions: this model has no caption head, as files of transformers"
        " have none; expected ImageTextModel(caption=CaptionHead())"
      )
    if self.caption_start is not None:
      tokens = tokens.at[:, 0].set(self.caption_start)
    mask = masks.multimodal_causal(valid, self.qformer.queries)
    _, text = self._encode(features, tokens, mask)
    return self.caption(text, self._table())

  def _encode(self, features, tokens, mask):
    """Returns the states of queries and of text."""
    if tokens.shape[1] > self.length:
      raise UserError(
        f"found texts of {tokens.shape[1]} tokens, expected at most"
        f" {self.length}, the number of positions"
      )
    shape = self.length, self.qformer.width
    init = nn.initializers.normal(0.02)
    places = weights.weight(self, "positions", init, shape)
    text = weights.take(self._table(), tokens) + places[: tokens.shape[1]]
    x = self.qformer.encode(features, text, mask)
    return x[:, : self.qformer.queries], x[:, self.qformer.queries :]

  def _table(self):
    shape = self.vocab_size, self.qformer.width
    return weights.weight(self, "embed", nn.initializers.normal(0.02), shape)
