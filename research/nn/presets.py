"""Model families (Llama, Qwen, Gemma, ...) and sizes, as configurations.

A new family is a new entry of `FAMILIES`; a new size is a `Sizes`.
"""

import dataclasses
import math
from collections.abc import Sequence

from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import Activation, Mlp
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.nn.norm import RMSNorm
from research.nn.rope import Llama3, Rope, Scaling
from research.nn.stack import Stack
from research.nn.time_embedding import AdaLN, TimeEmbedding
from research.nn.transformer import Transformer
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What all models of a family share.

  Attributes:
    activation: activation function of the gated feed-forward.
    norm_offset: 1 if norms are stored as `scale - 1`.
    qk_norm: whether the queries and keys of each head are normalised.
    post_norm: whether sublayer outputs are normalised before the residual add.
    qkv_bias, out_bias, mlp_bias: which projections have a bias.
    scale_embeddings: whether embeddings are multiplied by `sqrt(D)`.
    tied: default for tying the head to the embedding.
    pattern: kinds of layers, `"global"` or `"local"` (windowed), repeated.
  """

  activation: Activation = "silu"
  norm_offset: float = 0.0
  qk_norm: bool = False
  post_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  scale_embeddings: bool = False
  tied: bool = False
  pattern: tuple[str, ...] = ("global",)


_GEMMA = Family(
  activation="gelu_tanh", norm_offset=1.0, scale_embeddings=True, tied=True
)

FAMILIES: dict[str, Family] = {
  "llama": Family(),
  "mistral": Family(pattern=("local",)),
  "mixtral": Family(pattern=("local",)),
  "qwen2": Family(qkv_bias=True),
  "qwen3": Family(qk_norm=True),
  "qwen3_moe": Family(qk_norm=True, pattern=("local",)),
  "gemma": _GEMMA,
  "gemma2": dataclasses.replace(
    _GEMMA, post_norm=True, pattern=("local", "global")
  ),
  "gemma3": dataclasses.replace(
    _GEMMA,
    post_norm=True,
    qk_norm=True,
    pattern=("local",) * 5 + ("global",),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse:
  """Configuration of mixture-of-experts layers.

  Attributes:
    routing: number of experts, and how each token's experts are selected.
    hidden: inner width of each expert.
    shared: number of shared experts of that width, which every token uses.
    dense: indices of layers with a dense feed-forward instead (DeepSeek's first
      ones).
  """

  routing: Routing
  hidden: int
  shared: int = 0
  dense: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Hyperparameters of a single model within its family.

  Attributes:
    vocab, width, depth, heads, kv_heads, head_dim, hidden: `V D L N K H F`.
    sparse: configuration of MoE layers, or None. With it, `hidden` is the inner
      width of the dense layers.
    rotated: share of the head dimensions that are rotated, the first ones.
    theta, scaling: base and context extension of the rotary embedding.
    local_theta: base of the rotary embedding of windowed layers, which is never
      scaled; None if all layers share one.
    window: attention window of local layers in tokens, including the query.
    eps: epsilon of the norms.
    tied: whether the head is the embedding; None for the family's default.
    attention_scale: scale of the attention logits; None for `H**-0.5`.
    attention_softcap, logit_softcap: soft caps, or None.
    pattern: kinds of layers, repeated; None for the family's.
    max_positions: context length.
    time_embedding: configuration of the timestep conditioning, or None.
  """

  vocab: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  hidden: int
  head_dim: int
  sparse: Sparse | None = None
  rotated: float | int = 1.0
  theta: float = 10_000.0
  scaling: Scaling | None = None
  local_theta: float | None = None
  window: int | None = None
  eps: float = 1e-5
  tied: bool | None = None
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  pattern: Sequence[str] | None = None
  max_positions: int | None = None
  time_embedding: TimeEmbedding | None = None


def transformer(
  family: Family, sizes: Sizes, dtype: str = "float32"
) -> Transformer:
  """Returns the model of `sizes` in `family`, computing in `dtype`."""
  norm = RMSNorm(eps=sizes.eps, offset=family.norm_offset)
  global_rope = Rope(
    theta=sizes.theta, scaling=sizes.scaling, fraction=sizes.rotated
  )
  local_rope = global_rope
  change = None
  if sizes.time_embedding is not None:
    change = AdaLN(zero_gate=sizes.time_embedding.zero_gate)
  if sizes.local_theta is not None:
    local_rope = Rope(theta=sizes.local_theta, fraction=sizes.rotated)

  def block(kind: str, sparse: Sparse | None) -> Block:
    local = kind == "local" and sizes.window is not None
    return Block(
      attention=Attention(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=local_rope if kind == "local" else global_rope,
        window=sizes.window if local else None,
        scale=sizes.attention_scale,
        softcap=sizes.attention_softcap,
        qk_norm=norm if family.qk_norm else None,
        qkv_bias=family.qkv_bias,
        out_bias=family.out_bias,
      ),
      mlp=_feed_forward(family, sizes, sparse),
      norm=norm,
      post_norm=norm if family.post_norm else None,
      modulation=change,
    )

  kinds = tuple(sizes.pattern or family.pattern)
  dense = set(sizes.sparse.dense) if sizes.sparse else ()
  pattern = tuple(block(kind, sizes.sparse) for kind in kinds)
  if dense:
    # Individual layers differ, so the pattern has one entry per layer.
    pattern = tuple(
      block(kinds[i % len(kinds)], None if i in dense else sizes.sparse)
      for i in range(sizes.depth)
    )
  return Transformer(
    vocab_size=sizes.vocab,
    width=sizes.width,
    stack=Stack(sizes.depth, pattern),
    norm=norm,
    tied=family.tied if sizes.tied is None else sizes.tied,
    embed_scale=math.sqrt(sizes.width) if family.scale_embeddings else 1.0,
    softcap=sizes.logit_softcap,
    dtype=dtype,
    max_positions=sizes.max_positions,
    time_embedding=sizes.time_embedding,
  )


def _feed_forward(
  family: Family, sizes: Sizes, sparse: Sparse | None
) -> Mlp | Moe:
  if sparse is None:
    return Mlp(
      hidden=sizes.hidden, activation=family.activation, bias=family.mlp_bias
    )
  shared = None
  if sparse.shared:
    shared = Mlp(
      hidden=sparse.hidden * sparse.shared, activation=family.activation
    )
  return Moe(
    routing=sparse.routing,
    hidden=sparse.hidden,
    activation=family.activation,
    shared=shared,
  )


def sizes_of_width(
  width: int,
  *,
  vocab: int,
  depth: int = 2,
  heads: int = 4,
  theta: float = 10_000.0,
  max_positions: int | None = None,
) -> Sizes:
  """Returns sizes that follow from a width: models of a ladder.

  The gated feed-forward has a hidden width of 8/3 `width`, so that it has as
  many parameters as one of 4 `width` without a gate (Shazeer 2020), and a layer
  has 12 `width**2`. The embedding is not tied to the head.

  Args:
    width, vocab, depth, heads, theta, max_positions: see `Sizes`.

  Raises:
    UserError: `width` is not an even multiple of `heads`, as rotations want.
  """
  if width % (2 * heads):
    raise UserError(
      f"width: found {width}, expected a multiple of {2 * heads}, for {heads}"
      " heads of an even size"
    )
  return Sizes(
    vocab=vocab,
    width=width,
    depth=depth,
    heads=heads,
    kv_heads=heads,
    head_dim=width // heads,
    hidden=8 * width // 3,
    theta=theta,
    tied=False,
    max_positions=max_positions,
  )


SMOLLM2_135M = Sizes(
  vocab=49_152,
  width=576,
  depth=30,
  heads=9,
  kv_heads=3,
  hidden=1_536,
  head_dim=64,
  theta=100_000.0,
  tied=True,
  max_positions=8_192,
)

LLAMA3_8B = Sizes(
  vocab=128_256,
  width=4_096,
  depth=32,
  heads=32,
  kv_heads=8,
  hidden=14_336,
  head_dim=128,
  theta=500_000.0,
  scaling=Llama3(factor=8.0, low=1.0, high=4.0, original=8_192),
  tied=False,
  max_positions=131_072,
)

LLAMA2_7B = Sizes(
  vocab=32_000,
  width=4_096,
  depth=32,
  heads=32,
  kv_heads=32,
  hidden=11_008,
  head_dim=128,
  tied=False,
  max_positions=4_096,
)

LLADA_8B = Sizes(
  vocab=126_464,
  width=4_096,
  depth=32,
  heads=32,
  kv_heads=32,
  hidden=12_288,
  head_dim=128,
  theta=500_000.0,
  pattern=("global",),
  tied=False,
  max_positions=4_096,
)

MIXTRAL_8X7B = Sizes(
  vocab=32_000,
  width=4_096,
  depth=32,
  heads=32,
  kv_heads=8,
  hidden=14_336,
  head_dim=128,
  sparse=Sparse(routing=Routing(experts=8, active=2), hidden=14_336),
  theta=1_000_000.0,
  tied=False,
  max_positions=32_768,
)

QWEN3_30B_A3B = Sizes(
  vocab=151_936,
  width=2_048,
  depth=48,
  heads=32,
  kv_heads=4,
  hidden=6_144,
  head_dim=128,
  sparse=Sparse(routing=Routing(experts=128, active=8), hidden=768),
  theta=1_000_000.0,
  eps=1e-6,
  tied=False,
  max_positions=40_960,
)

LLADA_MOE_7B = Sizes(
  vocab=157_184,
  width=2_048,
  depth=16,
  heads=16,
  kv_heads=16,
  hidden=8_192,
  head_dim=128,
  sparse=Sparse(
    routing=Routing(experts=64, active=8, normalised=False), hidden=1_024
  ),
  theta=50_000.0,
  pattern=("global",),
  tied=False,
  max_positions=8_192,
)
"""Family `qwen3_moe`, with bidirectional attention."""

LLADA2_MINI = Sizes(
  vocab=157_184,
  width=2_048,
  depth=20,
  heads=16,
  kv_heads=4,
  hidden=5_120,
  head_dim=128,
  sparse=Sparse(
    routing=Routing(
      experts=256,
      active=8,
      score="sigmoid",
      scale=2.5,
      biased=True,
      groups=8,
      active_groups=4,
      group_score="top2",
    ),
    hidden=512,
    shared=1,
    dense=(0,),
  ),
  rotated=0.5,
  theta=600_000.0,
  eps=1e-6,
  tied=False,
  max_positions=32_768,
)
"""Family `qwen3`, with block-causal attention in blocks of 32 tokens."""

DREAM_7B = Sizes(
  vocab=152_064,
  width=3_584,
  depth=28,
  heads=28,
  kv_heads=4,
  hidden=18_944,
  head_dim=128,
  theta=1_000_000.0,
  eps=1e-6,
  tied=False,
  max_positions=131_072,
)
"""Family `qwen2`, with bidirectional attention; the logits of a token are
computed at the position before it. Also DiffuCoder's sizes."""
