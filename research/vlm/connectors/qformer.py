"""BLIP-2's Q-Former: queries that read an image.

Li et al. 2023, arXiv:2301.12597. As a connector it makes a fixed number of soft
tokens.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import layers
from research.nn.attention import Attention, CrossAttention
from research.nn.mlp import PlainMlp
from research.nn.norm import LayerNorm
from research.nn.stack import Stack
from research.typing import Array, Float, Params, PRNGKey
from research.vlm.connectors.latents import latents
from research.vlm.connectors.projections import Grid


class QFormerBlock(nn.Module):
  """A post-norm layer of BERT in which queries also attend to an image.

  Each sublayer is `norm(x + f(x))`.

  Attributes:
    attention: self-attention of the queries.
    mlp: feed-forward.
    cross_attention: of the queries over the image, or None.
    norm: after each sublayer.
  """

  attention: Attention
  mlp: PlainMlp
  cross_attention: CrossAttention | None = None
  norm: LayerNorm = LayerNorm(eps=1e-12)

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S D"], image: Float[Array, "B N C"]
  ) -> Float[Array, "B S D"]:
    """Returns the queries' states after this layer."""
    positions = jnp.zeros(x.shape[:2], jnp.int32)
    y, _ = self.attention(x, positions, Mask.full())
    x = self._norm("attention_norm", x + y)
    if self.cross_attention is not None:
      y = self.cross_attention(x, image)
      x = self._norm("cross_attention_norm", x + y)
    x = self._norm("mlp_norm", x + self.mlp(x))
    return sharding.constrain(x, "batch", "length", None)

  def _norm(self, name, x):
    return self.norm.clone(name=name, parent=self)(x)


class QFormer(nn.Module):
  """Learned queries that read an image in several layers, then a matrix.

  Attributes:
    size: width of the language model, `D`.
    width: of the queries, `W`.
    stack: layers of `QFormerBlock`, see `qformer`.
    queries: number of soft tokens.
    norm: of the first layer's input.
    dtype: compute dtype; norms and softmax always compute in fp32.
    remat: see `layers.run_layers`.
  """

  size: int
  width: int
  stack: Stack
  queries: int = 32
  norm: LayerNorm = LayerNorm(eps=1e-12)
  dtype: str = "float32"
  remat: layers.Remat = "none"

  def layer_kinds(self) -> tuple[QFormerBlock, ...]:
    return self.stack.kinds()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    del grid
    image = x.astype(self.dtype)
    x = latents(self, image, self.queries, self.width, std=0.02)
    x = self.norm.clone(name="input_norm", parent=self)(x)

    def layer(block, params, x, state, alone):
      del alone
      return block.apply({"params": params}, x, image), state

    def init_layer(block: QFormerBlock, key: PRNGKey) -> Params:
      x = jnp.zeros((1, 1, self.width), self.dtype)
      return block.init(key, x, image[:1, :1])["params"]

    runs = layers.stacked_runs(self, self.stack, init_layer)
    x = layers.run_layers(runs, x, layer, remat=self.remat)[0]
    return weights.project(self, x, "projection", self.size, True)

  def tokens(self, grid: Grid) -> int:
    del grid
    return self.queries


def qformer(
  size: int,
  *,
  width: int = 768,
  depth: int = 12,
  heads: int = 12,
  hidden: int = 3_072,
  queries: int = 32,
  every: int = 2,
  eps: float = 1e-12,
  **more: Any,
) -> QFormer:
  """Returns a Q-Former of the shape of BERT; by default BLIP-2's.

  Args:
    size: width of the language model.
    every: queries attend to the image in layers 0, `every`, 2 `every`, ...
    **more: other attributes of `QFormer`.
  """
  shape = dict(heads=heads, head_dim=width // heads)
  biases = dict(qkv_bias=True, out_bias=True)
  norm = LayerNorm(eps=eps)

  def block(number: int) -> QFormerBlock:
    crosses = number % every == 0
    return QFormerBlock(
      attention=Attention(**shape, kv_heads=heads, rope=None, **biases),
      mlp=PlainMlp(hidden=hidden),
      cross_attention=CrossAttention(**shape, **biases) if crosses else None,
      norm=norm,
    )

  stack = Stack(depth, tuple(block(i) for i in range(every)))
  return QFormer(
    size=size, width=width, stack=stack, queries=queries, norm=norm, **more
  )
