"""Gemma 4's image tower: native resolution, and positions by row and column."""

import dataclasses

from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import Mlp
from research.nn.norm import RMSNorm, UnitRMS
from research.nn.rope import Rope, SpatialParts
from research.nn.stack import Stack
from research.vlm.encoders.clipped import Clipping
from research.vlm.encoders.positions import FactoredTable
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.vit import VisionTransformer
from research.vlm.images.normalise import HALF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Heads:
  """The heads of a tower, which need not fill its width.

  Attributes:
    kv_heads, head_dim: `K H`.
    theta: base of the rotation.
  """

  kv_heads: int
  head_dim: int = 64
  theta: float = 100.0


def gemma4_vision(
  sizes: EncoderSizes,
  heads: Gemma4Heads,
  *,
  clipping: Clipping | None = None,
  dtype: str = "float32",
) -> VisionTransformer:
  """Returns Gemma 4's image tower, as transformers computes it.

  Each patch gets a learned vector of its row and one of its column, and is
  rotated by both. Patches are values in [0, 1].

  Args:
    sizes: of the tower; its grid is the rows, and columns, that it has vectors
      for.
  """
  norm = RMSNorm(eps=sizes.eps or 1e-6)
  block = Block(
    attention=Attention(
      heads=sizes.heads,
      kv_heads=heads.kv_heads,
      head_dim=heads.head_dim,
      rope=Rope(theta=heads.theta, axes=SpatialParts()),
      scale=1.0,
      qk_norm=norm,
      v_norm=UnitRMS(eps=norm.eps),
    ),
    mlp=Mlp(hidden=sizes.hidden, activation=sizes.activation or "gelu_tanh"),
    norm=norm,
    post_norm=norm,
  )
  return VisionTransformer(
    width=sizes.width,
    patch=sizes.patch,
    stack=Stack(sizes.depth, (block,)),
    positions=FactoredTable(sizes.grid),
    centre=HALF,
    patch_bias=False,
    norm=None,
    clipping=clipping,
    dtype=dtype,
  )
