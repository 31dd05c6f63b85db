"""Molmo 2's connector: attention over groups of patches."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn.attention import CrossAttention
from research.nn.mlp import ACTIVATIONS, Activation
from research.typing import Array, Float, Int
from research.vlm.connectors.projections import Grid
from research.vlm.images.tiling.overlap import grouped


class GroupAttention(nn.Module):
  """The mean of a group attends to its patches; then a gated feed-forward.

  Molmo 2 (arXiv:2601.10611). Unlike Molmo's `SquareAttention`, a group may
  reach over the edge of the image: what is missing is in no mean and is not
  attended to. Features are those of several layers, concatenated.

  Attributes:
    size: width of the language model, `D`.
    hidden: inner width of the feed-forward.
    width: of the attention's output.
    heads, head_dim: of the attention.
    kv_heads: of its keys and values; None for as many.
    side: patches of a group, each way, where whole views are read.
    activation: of the gate.
  """

  size: int
  hidden: int
  width: int
  heads: int = 16
  head_dim: int = 72
  side: int = 2
  activation: Activation = "silu"
  kv_heads: int | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns a soft token for each square of a view.

    Args:
      x: features of the patches, row by row.
      grid: of the patches; those at an odd edge are in smaller groups.
    """
    index = np.arange(grid[0] * grid[1], dtype=np.int32).reshape(grid)
    groups = jnp.asarray(grouped(index, self.side))
    return self.pool(x, jnp.broadcast_to(groups, (len(x), *groups.shape)))

  @nn.compact
  def pool(
    self, x: Float[Array, "B N C"], groups: Int[Array, "B S G"]
  ) -> Float[Array, "B S D"]:
    """Returns a soft token for each group.

    Args:
      x: features of patches.
      groups: numbers of the patches of each; -1 for none.
    """
    rows, count, most = groups.shape
    valid = groups >= 0
    index = jnp.maximum(groups, 0).reshape(rows, count * most, 1)
    found = jnp.take_along_axis(x, index, axis=1)
    found = found.reshape(rows * count, most, x.shape[-1])
    valid = valid.reshape(rows * count, most)
    found = jnp.where(valid[..., None], found, 0)
    number = jnp.maximum(jnp.sum(valid, axis=-1), 1)[:, None, None]
    mean = jnp.sum(found, axis=1, keepdims=True) / number.astype(x.dtype)
    attention = CrossAttention(
      heads=self.heads,
      head_dim=self.head_dim,
      kv_heads=self.kv_heads,
      size=self.width,
      qkv_bias=True,
      out_bias=True,
      name="attention",
    )
    segments = jnp.zeros((len(valid), 1), jnp.int32), jnp.where(valid, 0, -1)
    y = attention(mean, found, Mask.full(segments=segments))
    y = y.reshape(rows, count, -1)
    sizes = {"gate": self.hidden, "up": self.hidden}
    gate, up = weights.project_all(self, y, sizes)
    product = ACTIVATIONS[self.activation](gate) * up
    product = sharding.constrain(product, "batch", None, "hidden")
    return weights.project(self, product, "down", self.size)

  def tokens(self, grid: Grid) -> int:
    rows, columns = (-(-n // self.side) for n in grid)
    return rows * columns
