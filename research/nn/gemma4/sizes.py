"""Gemma 4's dense language models, as one function of their sizes.

They are not a row of `nn.presets`: global layers have heads of another size,
the last layers borrow keys and values, and every layer may get vectors of its
own.
"""

import dataclasses
import math
from typing import Literal

from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.gemma4.per_layer import PerLayerInputs, PerLayerUpdate
from research.nn.mlp import Activation, Mlp
from research.nn.norm import LayerScalar, RMSNorm, UnitRMS
from research.nn.rope import Proportional, Rope
from research.nn.stack import Stack
from research.nn.transformer import Transformer
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Sizes:
  """Hyperparameters of a model.

  Attributes:
    vocab, width, hidden, heads: `V D F N`.
    kinds: of each layer, `"local"` (windowed) or `"global"`.
    kv_heads, head_dim: `K H` of local layers.
    global_kv_heads, global_head_dim: of global layers.
    global_values: whether global layers project values, or take their keys'.
    global_images: how global layers see images, see `Attention.images`.
    window: of local layers, in tokens, including the query.
    theta, rotated, factor: of the rotation of global layers: base, share of the
      frequencies that turn, and their divisor.
    local_theta: base of the rotation of local layers.
    kv_shared_layers: number of layers, the last ones, that use the keys and
      values of the last layer of their kind before them.
    kv_shared_hidden: inner width of those layers' feed-forwards.
    per_layer: width of the vectors that each layer gets of each token; 0 for
      none.
    per_layer_vocab: rows of their table.
    padding: id of the padding token, whose row is that of images.
    eps: of the norms.
    activation: of the feed-forwards.
    softcap: of the logits, or None.
    tied: whether the head is the embedding.
    max_positions: context length.
  """

  vocab: int
  width: int
  hidden: int
  heads: int
  kinds: tuple[Literal["local", "global"], ...]
  kv_heads: int
  head_dim: int = 256
  global_kv_heads: int
  global_head_dim: int = 512
  global_values: Literal["projected", "keys"] = "projected"
  global_images: Literal["as_masked", "causal"] = "as_masked"
  window: int = 512
  theta: float = 1e6
  rotated: float = 0.25
  factor: float = 1.0
  local_theta: float = 1e4
  kv_shared_layers: int = 0
  kv_shared_hidden: int = 0
  per_layer: int = 0
  per_layer_vocab: int = 0
  padding: int = 0
  eps: float = 1e-6
  activation: Activation = "gelu_tanh"
  softcap: float | None = None
  tied: bool = True
  max_positions: int | None = 131_072

  def __post_init__(self):
    unshared_kinds = self.kinds[: len(self.kinds) - self.kv_shared_layers]
    if not unshared_kinds or set(unshared_kinds) != set(self.kinds):
      raise UserError(
        f"Gemma4Sizes.kv_shared_layers: found {self.kv_shared_layers} of"
        f" {len(self.kinds)} layers, expected a layer of each kind before them"
      )


def gemma4(sizes: Gemma4Sizes, dtype: str = "float32") -> Transformer:
  """Returns the model of these sizes, computing in `dtype`."""
  norm = RMSNorm(eps=sizes.eps)
  inputs = None
  if sizes.per_layer:
    inputs = PerLayerInputs(
      depth=len(sizes.kinds),
      size=sizes.per_layer,
      vocab=sizes.per_layer_vocab,
      norm=RMSNorm(eps=sizes.eps),
      padding=sizes.padding,
    )
  blocks = [_block(sizes, i, norm) for i in range(len(sizes.kinds))]
  period = next(
    p
    for p in range(1, len(blocks) + 1)
    if all(block == blocks[i % p] for i, block in enumerate(blocks))
  )
  return Transformer(
    vocab_size=sizes.vocab,
    width=sizes.width,
    stack=Stack(len(blocks), tuple(blocks[:period])),
    norm=norm,
    tied=sizes.tied,
    embed_scale=math.sqrt(sizes.width),
    softcap=sizes.softcap,
    dtype=dtype,
    max_positions=sizes.max_positions,
    per_layer=inputs,
  )


def _block(sizes: Gemma4Sizes, i: int, norm: RMSNorm) -> Block:
  kinds, kind = sizes.kinds, sizes.kinds[i]
  first = len(kinds) - sizes.kv_shared_layers
  update = None
  if sizes.per_layer:
    # A norm of its own: Linen shares the parameters of one object.
    own = RMSNorm(eps=sizes.eps)
    update = PerLayerUpdate(norm=own, activation=sizes.activation)
  return Block(
    attention=Attention(
      heads=sizes.heads,
      scale=1.0,
      qk_norm=norm,
      v_norm=UnitRMS(eps=sizes.eps),
      kv=_sharing(kinds, i, first),
      **(_local(sizes) if kind == "local" else _global(sizes)),
    ),
    mlp=Mlp(
      hidden=sizes.hidden if i < first else sizes.kv_shared_hidden,
      activation=sizes.activation,
    ),
    norm=norm,
    post_norm=norm,
    per_layer=update,
    output_scale=LayerScalar(),
  )


def _sharing(kinds, i: int, first: int) -> Literal["own", "lent", "borrowed"]:
  """Returns whether layer i lends or borrows; the first that does is given."""
  if i >= first:
    return "borrowed"
  lends = kinds[i] in kinds[first:] and kinds[i] not in kinds[i + 1 : first]
  return "lent" if lends else "own"


def _local(sizes: Gemma4Sizes) -> dict:
  return dict(
    kv_heads=sizes.kv_heads,
    head_dim=sizes.head_dim,
    rope=Rope(theta=sizes.local_theta),
    window=sizes.window,
  )


def _global(sizes: Gemma4Sizes) -> dict:
  turns = Proportional(fraction=sizes.rotated, factor=sizes.factor)
  return dict(
    kv_heads=sizes.global_kv_heads,
    head_dim=sizes.global_head_dim,
    rope=Rope(theta=sizes.theta, scaling=turns),
    values=sizes.global_values,
    images=sizes.global_images,
  )
