"""Text towers of contrastive models: one vector per text."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import layers
from research.nn.block import Block
from research.nn.norm import LayerNorm, Norm
from research.nn.stack import Stack
from research.typing import Array, Float, Int, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndOfText:
  """CLIP's: causal attention; the vector is that of the end token.

  Attributes:
    token: id of the end token, whose first occurrence counts. None for the
      greatest id of the row, as in checkpoints whose configuration has the
      wrong id 2.
  """

  token: int | None = None

  def mask(self) -> Mask:
    return Mask.causal()

  def index(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    if self.token is None:
      return jnp.argmax(tokens, axis=-1)
    return jnp.argmax(tokens == self.token, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastPosition:
  """SigLIP's: full attention, padding included; the last position's vector.

  Texts are padded to exactly as many tokens as there are positions: the model
  was trained without a padding mask.
  """

  def mask(self) -> Mask:
    return Mask.full()

  def index(self, tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    return jnp.full(tokens.shape[:1], tokens.shape[1] - 1)


class TextEncoder(nn.Module):
  """A transformer over tokens that returns one vector per text.

  Attributes:
    vocab_size, width: `V`, `D`.
    length: number of positions, which every row has exactly.
    stack: the layers.
    read: attention mask, and the position whose state is the vector.
    size: of the result, `E`.
    projection_bias: whether the projection to it has a bias.
    norm: the final norm.
    remat: see `layers.run_layers`.
  """

  vocab_size: int
  width: int
  length: int
  stack: Stack
  read: EndOfText | LastPosition
  size: int
  projection_bias: bool = False
  norm: Norm = LayerNorm()
  dtype: str = "float32"
  remat: layers.Remat = "none"

  def layer_kinds(self) -> tuple[Block, ...]:
    return self.stack.kinds()

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
    """Returns one vector per row.

    Raises:
      UserError: the rows do not have `length` tokens.
    """
    if tokens.shape[1] != self.length:
      raise UserError(
        f"text encoder: found {tokens.shape[1]} tokens a row, expected exactly"
        f" {self.length}; pad or truncate to that"
      )
    init = nn.initializers.normal(0.02)
    table = weights.weight(self, "embed", init, (self.vocab_size, self.width))
    places = weights.weight(
      self, "positions", nn.initializers.normal(0.01), (self.length, self.width)
    )
    x = weights.take(table, tokens).astype(self.dtype)
    x = sharding.constrain(
      x + places.astype(self.dtype), "batch", "length", None
    )
    positions = jnp.broadcast_to(jnp.arange(self.length), tokens.shape)
    mask = self.read.mask()

    def layer(block, own, x, state, alone):
      del alone
      x, _, _ = block.apply({"params": own}, x, positions, mask)
      return x, state

    runs = layers.stacked_runs(self, self.stack, self._init_layer)
    x, _, _ = layers.run_layers(runs, x, layer, remat=self.remat)
    x = self.norm.clone(name="final_norm", parent=self)(x)
    x = x[jnp.arange(x.shape[0]), self.read.index(tokens)]
    return weights.project(
      self, x, "projection", self.size, self.projection_bias
    )

  def _init_layer(self, block: Block, key: PRNGKey) -> Params:
    return layers.new_layer(block, key, self.width, self.dtype)
