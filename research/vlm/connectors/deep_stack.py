"""DeepStack: soft tokens for the input of a language model, and for deeper."""

import jax.numpy as jnp
from flax import linen as nn

from research.typing import Array, Float, UserError
from research.vlm.connectors.projections import Grid, Squares


class DeepStack(nn.Module):
  """A merger for the encoder's output, and one for each earlier layer.

  Meng et al. 2024 (arXiv:2406.04334), as in Qwen3-VL (arXiv:2511.21631,
  section 2): what the mergers make of earlier layers is added to the outputs of
  the language model's first layers, at the image's tokens.

  Attributes:
    first: of the encoder's output, the first of `Features.layers`.
    deeper: of each of J other layers, in order.
  """

  first: Squares
  deeper: tuple[Squares, ...]

  @property
  def side(self) -> int:
    """Returns the side of a square, in patches."""
    return self.first.side

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns the soft tokens, and behind each what is added in deeper layers.

    Args:
      x: features of the output and of J other layers, concatenated.

    Returns:
      `[B, S, (1 + J) width]`; `Splice` takes them apart.
    """
    count = 1 + len(self.deeper)
    if x.shape[-1] % count:
      raise UserError(
        f"DeepStack: found features of width {x.shape[-1]}, expected those of"
        f" {count} layers; name so many in Features.layers"
      )
    of_layers = jnp.split(x, count, axis=-1)
    mergers = self.first, *self.deeper
    soft = [f(x, grid) for f, x in zip(mergers, of_layers, strict=True)]
    return jnp.concatenate(soft, axis=-1)

  def tokens(self, grid: Grid) -> int:
    return self.first.tokens(grid)
