"""Cross-attention: queries of one sequence, keys and values of another."""

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.masks import Mask
from research import weights
from research.nn.attention_context import attend
from research.nn.norm import Norm
from research.typing import Array, Float


class CrossAttention(nn.Module):
  """Attention of tokens `x` over `memory`, computed by `flash_attention`.

  Parameters are those of `Attention`: `q`, `k`, `v`, `o` and their biases.

  Attributes:
    heads, head_dim: `N`, `H`; keys and values have as many heads.
    scale: of the attention logits; None for `H**-0.5`.
    qk_norm: normalises the queries and keys of each head, or None.
    qkv_bias, out_bias: whether those projections have a bias.
  """

  heads: int
  head_dim: int
  scale: float | None = None
  qk_norm: Norm | None = None
  qkv_bias: bool = False
  out_bias: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S C"],
    mask: Mask | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns the attention output; 0 for a query that sees nothing.

    Args:
      x: what asks.
      memory: what is attended to.
      mask: which of the S each of the T sees; None for all.
    """
    size = self.heads * self.head_dim
    q = weights.project(self, x, "q", size, self.qkv_bias)
    k, v = weights.project_all(
      self, memory, {"k": size, "v": size}, self.qkv_bias
    )
    q, k, v = (
      y.reshape(*y.shape[:2], self.heads, self.head_dim) for y in (q, k, v)
    )
    if self.qk_norm is not None:
      q = self.qk_norm.clone(name="q_norm", parent=self)(q)
      k = self.qk_norm.clone(name="k_norm", parent=self)(k)
    q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
    mask = Mask.full() if mask is None else mask
    y = attend(q, k, v, mask=mask, scale=self.scale)
    y = y.reshape(*y.shape[:2], size)
    return weights.project(self, y, "o", x.shape[-1], self.out_bias)
