"""Families of models: what distinguishes them, as values.

A new family is a new row of `FAMILIES`; a new size is a `Sizes`.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What the models of a family share, whatever their size.

  Attributes:
    activation: of the gated feed-forward.
    norm_offset: 1 where norms are stored as `scale - 1`.
    qk_norm: whether each head's queries and keys are normalised.
    post_norm: whether outputs are normalised before they are added.
    qkv_bias, out_bias, mlp_bias: which projections add a bias.
    scale_embeddings: whether embeddings are multiplied by `sqrt(D)`.
    tied: whether the head is the embedding where a file does not say.
    pattern: `"global"` and `"local"` (windowed) layers, repeated.
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
  """Experts in place of a single feed-forward.

  Attributes:
    routing: how many experts, and how a token's are chosen.
    hidden: inner width of each.
    shared: how many more of that width every token uses.
    dense: the layers that keep a single feed-forward (DeepSeek's first ones).
  """

  routing: Routing
  hidden: int
  shared: int = 0
  dense: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What a single model adds to its family.

  Attributes:
    vocab, width, depth, heads, kv_heads, head_dim, hidden: `V D L N K H F`.
    sparse: its experts, or None; `hidden` is then that of the dense layers.
    rotated: share of the head's dimensions that rotate, the first ones.
    theta, scaling: of the rotation.
    local_theta: of windowed layers' rotation, which are never scaled, or None
      where all layers share one.
    window: tokens that a local layer looks back on, its own included.
    eps: of the norms.
    tied: whether the head is the embedding; None for the family's word.
    attention_scale: of the logits, or None for `H**-0.5`.
    attention_softcap, logit_softcap: or None.
    pattern: kinds of layers, repeated; None for the family's.
    max_positions: context length.
    clock: how the model is told the time, or None.
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
  clock: TimeEmbedding | None = None


def transformer(
  family: Family, sizes: Sizes, dtype: str = "float32"
) -> Transformer:
  """Returns the model of `sizes` in `family`, computing in `dtype`."""
  norm = RMSNorm(eps=sizes.eps, offset=family.norm_offset)
  shared = Rope(
    theta=sizes.theta, scaling=sizes.scaling, fraction=sizes.rotated
  )
  own = shared
  change = None
  if sizes.clock is not None:
    change = AdaLN(closed=sizes.clock.closed)
  if sizes.local_theta is not None:
    own = Rope(theta=sizes.local_theta, fraction=sizes.rotated)

  def block(kind: str, sparse: Sparse | None) -> Block:
    local = kind == "local" and sizes.window is not None
    return Block(
      attention=Attention(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope=own if kind == "local" else shared,
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
    # Some layers differ, so the pattern is as long as the stack.
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
    clock=sizes.clock,
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
"""Of family `qwen3_moe`; all tokens see each other."""

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
"""Of family `qwen3`; blocks of 32 tokens see those before and themselves."""

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
"""Of family `qwen2`; all tokens see each other, logits are those of the place
before. DiffuCoder's too."""
