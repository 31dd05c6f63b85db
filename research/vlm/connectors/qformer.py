"""BLIP-2's Q-Former: queries that read an image, and a text beside them.

Li et al. 2023, arXiv:2301.12597. As a connector it makes a fixed number of soft
tokens; `research.vlm.bootstrapping` trains it with texts first.
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
from research.typing import Array, Float, Params, PRNGKey, UserError
from research.vlm.connectors.latents import latents
from research.vlm.connectors.projections import Grid


class QFormerBlock(nn.Module):
  """A post-norm layer of BERT in which queries also attend to an image.

  Queries and text share the self-attention and have feed-forwards of their own;
  only the queries attend to the image. Each sublayer is `norm(x + f(x))`.

  Attributes:
    attention: over queries and text.
    mlp: feed-forward of the queries.
    cross_attention: of the queries over the image, or None.
    text_mlp: feed-forward of the text; None for a Q-Former without texts.
    norm: after each sublayer.
  """

  attention: Attention
  mlp: PlainMlp
  cross_attention: CrossAttention | None = None
  text_mlp: PlainMlp | None = None
  norm: LayerNorm = LayerNorm(eps=1e-12)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Mask,
    image: Float[Array, "B N C"] | None,
    queries: int,
  ) -> Float[Array, "B T D"]:
    """Returns the layer's output.

    Args:
      x: queries, then text.
      mask: of the self-attention.
      image: what the queries read; None without queries.
      queries: how many of the T are queries.
    """
    positions = jnp.zeros(x.shape[:2], jnp.int32)
    y, _ = self.attention(x, positions, mask)
    x = self._norm("attention_norm", x + y)
    x, text = x[:, :queries], x[:, queries:]
    if queries:
      if self.cross_attention is not None:
        y = self.cross_attention(x, image)
        x = self._norm("cross_attention_norm", x + y)
      x = self._norm("mlp_norm", x + self.mlp(x))
    if text.shape[1]:
      if self.text_mlp is None:
        raise UserError("this Q-Former has no text_mlp, so it takes no text")
      text = self._norm("text_mlp_norm", text + self.text_mlp(text))
    x = jnp.concatenate([x, text], axis=1)
    return sharding.constrain(x, "batch", "length", None)

  def _norm(self, name, x):
    return self.norm.clone(name=name, parent=self)(x)


class QFormer(nn.Module):
  """Learned queries that read an image in several layers, then a matrix.

  Attributes:
    size: width of the language model, `D`.
    width: of the queries and of the text.
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
    """Returns each layer's block, first to last."""
    return self.stack.kinds()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N C"], grid: Grid
  ) -> Float[Array, "B S D"]:
    """Returns `queries` soft tokens; arguments as for `Linear`."""
    del grid
    return weights.project(self, self.encode(x), "projection", self.size, True)

  def tokens(self, grid: Grid) -> int:
    """Returns the number of soft tokens, whatever the grid."""
    del grid
    return self.queries

  @nn.compact
  def encode(
    self,
    image: Float[Array, "B N C"] | None,
    text: Float[Array, "B T W"] | None = None,
    mask: Mask | None = None,
  ) -> Float[Array, "B S W"]:
    """Returns the states of the queries, then those of the text.

    Args:
      image: features of the patches; None for a text without queries.
      text: embeddings, or None.
      mask: of the self-attention among queries and text; None for all.
    """
    parts, queries = [], 0
    if image is not None:
      image, queries = image.astype(self.dtype), self.queries
      parts.append(latents(self, image, queries, self.width, std=0.02))
    if text is not None:
      parts.append(text.astype(self.dtype))
    x = jnp.concatenate(parts, axis=1)
    x = self.norm.clone(name="input_norm", parent=self)(x)
    mask = Mask.full() if mask is None else mask

    def layer(block, own, x, state, alone):
      del alone
      return block.apply({"params": own}, x, mask, image, queries), state

    def init_layer(block: QFormerBlock, key: PRNGKey) -> Params:
      has_text = block.text_mlp is not None
      x = jnp.zeros((1, 1 + has_text, self.width), self.dtype)
      return block.init(key, x, Mask.full(), image[:1, :1], 1)["params"]

    runs = layers.stacked_runs(self, self.stack, init_layer)
    return layers.run_layers(runs, x, layer, remat=self.remat)[0]


def qformer(
  size: int,
  *,
  width: int = 768,
  depth: int = 12,
  heads: int = 12,
  hidden: int = 3_072,
  queries: int = 32,
  every: int = 2,
  text: bool = False,
  eps: float = 1e-12,
  **more: Any,
) -> QFormer:
  """Returns a Q-Former of the shape of BERT; by default BLIP-2's.

  Args:
    size: width of the language model.
    width, depth, heads, hidden: `W`, layers, heads, inner width.
    queries: number of soft tokens.
    every: queries attend to the image in layers 0, `every`, 2 `every`, ...
    text: whether it also takes texts.
    eps: of the norms.
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
      # An instance of its own: Linen shares the weights of one that is not.
      text_mlp=PlainMlp(hidden=hidden) if text else None,
      norm=norm,
    )

  stack = Stack(depth, tuple(block(i) for i in range(every)))
  return QFormer(
    size=size, width=width, stack=stack, queries=queries, norm=norm, **more
  )


def without_text(params: Params) -> dict[str, Any]:
  """Returns a Q-Former's parameters without those of its texts.

  Args:
    params: of a `QFormer` that was trained with texts; its projection to the
      language model is new in the second stage.
  """
  return {
    name: without_text(x) if isinstance(x, dict) else x
    for name, x in params.items()
    if not name.startswith("text_mlp")
  }
