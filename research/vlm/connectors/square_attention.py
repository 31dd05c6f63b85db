"""Molmo's connector: attention over small squares of patches."""

import jax.numpy as jnp
from flax import linen as nn

from research import sharding, weights
from research.nn.attention import CrossAttention
from research.nn.mlp import ACTIVATIONS, Activation
from research.typing import Array, Float
from research.vlm.connectors.projections import Grid, space_to_depth


class SquareAttention(nn.Module):
  """The mean of a square attends to its patches; then a gated feed-forward.

  Deitke et al. 2024, arXiv:2409.17146, section 2. Features are those of several
  layers of the encoder (`Features.layers`), concatenated.

  Attributes:
    size: width of the language model, `D`.
    hidden: inner width of the feed-forward.
    side: of a square, in patches.
    heads, head_dim: of the attention, whose output has `N H` channels.
    activation: of the gate.
  """

  size: int
  hidden: int
  side: int = 2
  heads: int = 16
  head_dim: int = 64
  activation: Activation = "silu"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B N C"],
    grid: Grid,
    coverage: Float[Array, "B N"] | None = None,
  ) -> Float[Array, "B S D"]:
    """Returns a soft token for each square.

    Args:
      coverage: share of each patch that is image rather than padding; negative
        for patches of absent crops, whose features are 0. None for 1.
    """
    x = self._padded(x, coverage)
    squares = space_to_depth(x, grid, self.side)
    rows, count, _ = squares.shape
    squares = squares.reshape(rows * count, self.side**2, x.shape[-1])
    attention = CrossAttention(
      heads=self.heads,
      head_dim=self.head_dim,
      size=self.heads * self.head_dim,
      qkv_bias=True,
      out_bias=True,
      name="attention",
    )
    y = attention(squares.mean(axis=1, keepdims=True), squares)
    y = y.reshape(rows, count, -1)
    sizes = {"gate": self.hidden, "up": self.hidden}
    gate, up = weights.project_all(self, y, sizes)
    product = ACTIVATIONS[self.activation](gate) * up
    product = sharding.constrain(product, "batch", None, "hidden")
    return weights.project(self, product, "down", self.size)

  def tokens(self, grid: Grid) -> int:
    return grid[0] * grid[1] // self.side**2

  def _padded(self, x, coverage):
    init = nn.initializers.normal(0.02)
    padding = weights.weight(self, "padding", init, (2, x.shape[-1]))
    if coverage is None:
      return x
    padding, coverage = padding.astype(x.dtype), coverage[..., None]
    x = x + jnp.where(coverage == 0, padding[0], 0)
    x = x + jnp.where((coverage > 0) & (coverage < 1), padding[1], 0)
    return jnp.where(coverage < 0, 0, x)
