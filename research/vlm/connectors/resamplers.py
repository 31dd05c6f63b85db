"""Connectors that ask all patches: learned queries with cross-attention."""

import jax.numpy as jnp
from flax import linen as nn

from research import weights
from research.nn.attention import CrossAttention
from research.nn.mlp import Activation, PlainMlp
from research.nn.norm import LayerNorm
from research.typing import Array, Float
from research.vlm.connectors.latents import latents
from research.vlm.connectors.projections import Grid


class AttentionPool(nn.Module):
  """Learned queries that attend to the patches once, then a matrix.

  Attributes:
    size: width of the language model, `D`.
    norm: of the patches.
  """

  size: int
  queries: int
  heads: int = 8
  norm: LayerNorm = LayerNorm()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    del grid
    width = x.shape[-1]
    queries = latents(self, x, self.queries, width, std=0.02)
    attention = CrossAttention(
      heads=self.heads, head_dim=width // self.heads, name="attention"
    )
    y = attention(queries, self.norm(x))
    return weights.project(self, y, "projection", self.size, True)

  def tokens(self, grid: Grid) -> int:
    del grid
    return self.queries


class _ResamplerLayer(nn.Module):
  """Latents attend to the patches and to themselves; a feed-forward."""

  heads: int
  head_dim: int
  activation: Activation
  eps: float

  @nn.compact
  def __call__(self, y, media):
    normed = LayerNorm(eps=self.eps, name="media_norm")(media)
    own = LayerNorm(eps=self.eps, name="attention_norm")(y)
    attention = CrossAttention(
      heads=self.heads, head_dim=self.head_dim, name="attention"
    )
    y = y + attention(own, jnp.concatenate([normed, own], axis=1))
    mlp = PlainMlp(
      hidden=4 * y.shape[-1],
      activation=self.activation,
      bias=False,
      name="mlp",
    )
    return y + mlp(LayerNorm(eps=self.eps, name="mlp_norm")(y))


class PerceiverResampler(nn.Module):
  """Flamingo's resampler (Alayrac et al. 2022, arXiv:2204.14198), section 3.1.

  In each layer `q` is made of the latents, `k` and `v` of the patches followed
  by the latents; neither attention nor feed-forward has biases.

  Attributes:
    size: width of the language model, `D`; None for soft tokens as wide as the
      patches, without the last matrix, for cross-attention.
    heads, head_dim: of the attention.
    activation: of the feed-forward, which is 4 times as wide as the patches.
    eps: of the norms.
  """

  size: int | None
  queries: int = 64
  depth: int = 6
  heads: int = 8
  head_dim: int = 64
  activation: Activation = "gelu"
  eps: float = 1e-5

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    del grid
    y = latents(self, x, self.queries, x.shape[-1], std=1.0)
    for i in range(self.depth):
      layer = _ResamplerLayer(
        self.heads,
        self.head_dim,
        self.activation,
        self.eps,
        name=f"resampler{i}",
      )
      y = layer(y, x)
    y = LayerNorm(eps=self.eps, name="final_norm")(y)
    if self.size is None:
      return y
    return weights.project(self, y, "projection", self.size, True)

  def tokens(self, grid: Grid) -> int:
    del grid
    return self.queries
