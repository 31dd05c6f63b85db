"""Published encoders as rows: a new one is a new row."""

import dataclasses

from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import Activation, PlainMlp
from research.nn.norm import LayerNorm, LayerScale
from research.nn.rope import Rope, Spatial
from research.nn.stack import Stack
from research.vlm.encoders.pooling import AttentionPooling, ClassPooling
from research.vlm.encoders.positions import AntialiasedTable, PositionTable
from research.vlm.encoders.text import EndOfText, LastPosition, TextEncoder
from research.vlm.encoders.vit import VisionTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSizes:
  """Hyperparameters of one tower.

  Attributes:
    width, depth, heads, hidden: `D`, layers, heads, inner width `F`.
    patch: side of a patch in pixels.
    grid: patches along each side of the images it was trained on.
    eps: of the norms; None for the family's.
    activation: of the feed-forwards; None for the family's.
  """

  width: int
  depth: int
  heads: int
  hidden: int
  patch: int = 16
  grid: int = 14
  eps: float | None = None
  activation: Activation | None = None


def _siglip(sizes: EncoderSizes) -> EncoderSizes:
  """Returns the sizes, SigLIP's norms and activation where they say none."""
  return dataclasses.replace(
    sizes,
    eps=sizes.eps or 1e-6,
    activation=sizes.activation or "gelu_tanh",
  )


def _clip(sizes: EncoderSizes) -> EncoderSizes:
  """Returns the sizes, CLIP's norms and activation where they say none."""
  return dataclasses.replace(
    sizes,
    eps=sizes.eps or 1e-5,
    activation=sizes.activation or "quick_gelu",
  )


def encoder_stack(sizes: EncoderSizes) -> Stack:
  """Returns pre-norm layers with full attention and biases everywhere.

  Args:
    sizes: with norms and activation.
  """
  block = Block(
    attention=Attention(
      heads=sizes.heads,
      kv_heads=sizes.heads,
      head_dim=sizes.width // sizes.heads,
      rope=None,
      qkv_bias=True,
      out_bias=True,
    ),
    mlp=PlainMlp(hidden=sizes.hidden, activation=sizes.activation),
    norm=LayerNorm(eps=sizes.eps),
  )
  return Stack(sizes.depth, (block,))


def siglip(sizes: EncoderSizes, *, head: bool = False) -> VisionTransformer:
  """Returns SigLIP's image tower (Zhai et al. 2023, arXiv:2303.15343).

  Args:
    head: whether it has the pooling head, which language models do not use.
  """
  sizes = _siglip(sizes)
  pooling = AttentionPooling(
    heads=sizes.heads,
    mlp=PlainMlp(hidden=sizes.hidden, activation=sizes.activation),
    norm=LayerNorm(eps=sizes.eps),
  )
  return VisionTransformer(
    width=sizes.width,
    patch=sizes.patch,
    stack=encoder_stack(sizes),
    positions=PositionTable(sizes.grid, sizes.grid),
    norm=LayerNorm(eps=sizes.eps),
    pooling=pooling if head else None,
  )


def naflex(sizes: EncoderSizes, *, head: bool = False) -> VisionTransformer:
  """Returns SigLIP 2's image tower for images of any shape (arXiv:2502.14786).

  SigLIP's, whose learned grid is resized to that of each image (NaFlex).

  Args:
    sizes: of the tower; its grid is that of the learned positions.
    head: as for `siglip`.
  """
  table = AntialiasedTable(sizes.grid, sizes.grid)
  return siglip(sizes, head=head).clone(positions=table)


def clip(sizes: EncoderSizes, *, size: int | None = None) -> VisionTransformer:
  """Returns CLIP's image tower (Radford et al. 2021, arXiv:2103.00020).

  Args:
    size: of the shared space; None for a tower without its projection.
  """
  sizes = _clip(sizes)
  return VisionTransformer(
    width=sizes.width,
    patch=sizes.patch,
    stack=encoder_stack(sizes),
    positions=PositionTable(sizes.grid, sizes.grid),
    patch_bias=False,
    class_token=True,
    input_norm=LayerNorm(eps=sizes.eps),
    norm=LayerNorm(eps=sizes.eps),
    pooling=None if size is None else ClassPooling(size),
  )


def rice(sizes: EncoderSizes) -> VisionTransformer:
  """Returns RICE's image tower (Xie et al. 2025, arXiv:2507.20025).

  CLIP's, rotated by row and column in place of learned positions, so that it
  takes images of any shape. Without a class token and a final norm, as language
  models use it.

  Args:
    sizes: of the tower; `grid` is not used.
  """
  tower = clip(sizes)
  [block] = tower.stack.blocks
  block = block.clone(
    attention=block.attention.clone(rope=Rope(axes=Spatial())),
    mlp=block.mlp.clone(activation="gelu"),
  )
  return tower.clone(
    stack=dataclasses.replace(tower.stack, blocks=(block,)),
    positions=None,
    class_token=False,
    norm=None,
  )


def eva(sizes: EncoderSizes) -> VisionTransformer:
  """EVA's image tower (Fang et al. 2022, arXiv:2211.07636): BLIP-2's."""
  return VisionTransformer(
    width=sizes.width,
    patch=sizes.patch,
    stack=encoder_stack(sizes),
    positions=PositionTable(sizes.grid, sizes.grid),
    class_token=True,
    norm=LayerNorm(eps=sizes.eps),
  )


def intern_vit(sizes: EncoderSizes) -> VisionTransformer:
  """Returns InternViT of 300 million parameters (Chen et al. 2023).

  Learned factors scale its sublayers; patches have no final norm, as language
  models use it. See `interop.vision.families.internvl` for the others.
  """
  [block] = encoder_stack(sizes).blocks
  stack = Stack(sizes.depth, (block.clone(post_norm=LayerScale(start=0.1)),))
  return eva(sizes).clone(stack=stack, norm=None)


def siglip_text(
  sizes: EncoderSizes, *, vocab: int, length: int = 64, size: int | None = None
) -> TextEncoder:
  """Returns SigLIP's text tower.

  Args:
    length: tokens a text, padding included.
    size: of the shared space; None for the width.
  """
  sizes = _siglip(sizes)
  return TextEncoder(
    vocab_size=vocab,
    width=sizes.width,
    length=length,
    stack=encoder_stack(sizes),
    read=LastPosition(),
    size=size or sizes.width,
    projection_bias=True,
    norm=LayerNorm(eps=sizes.eps),
  )


def clip_text(
  sizes: EncoderSizes,
  *,
  size: int,
  vocab: int = 49_408,
  length: int = 77,
  end: int | None = None,
) -> TextEncoder:
  """Returns CLIP's text tower.

  Args:
    length: tokens a text, padding included.
    end: id of the end token, see `EndOfText`.
  """
  sizes = _clip(sizes)
  return TextEncoder(
    vocab_size=vocab,
    width=sizes.width,
    length=length,
    stack=encoder_stack(sizes),
    read=EndOfText(token=end),
    size=size,
    norm=LayerNorm(eps=sizes.eps),
  )


SIGLIP_SIZES: dict[str, EncoderSizes] = {
  "mu": EncoderSizes(width=32, depth=1, heads=2, hidden=128),
  "Ti": EncoderSizes(width=192, depth=12, heads=3, hidden=768),
  "S": EncoderSizes(width=384, depth=12, heads=6, hidden=1_536),
  "B": EncoderSizes(width=768, depth=12, heads=12, hidden=3_072),
  "L": EncoderSizes(width=1_024, depth=24, heads=16, hidden=4_096),
  "So400m": EncoderSizes(
    width=1_152, depth=27, heads=16, hidden=4_304, patch=14, grid=16
  ),
  "g-opt": EncoderSizes(width=1_536, depth=40, heads=16, hidden=6_144),
}
"""The shapes of big_vision's towers; `grid` is that of 224 pixels."""

CLIP_L14_336 = EncoderSizes(
  width=1_024, depth=24, heads=16, hidden=4_096, patch=14, grid=24
)
"""The image tower of LLaVA: CLIP ViT-L/14 at 336 pixels."""

EVA_G14 = EncoderSizes(
  width=1_408, depth=39, heads=16, hidden=6_144, patch=14, grid=16, eps=1e-6,
  activation="gelu",
)  # fmt: skip
"""The image tower of BLIP-2: ViT-g/14 at 224 pixels, without its last layer."""

INTERN_VIT_300M = EncoderSizes(
  width=1_024, depth=24, heads=16, hidden=4_096, patch=14, grid=32, eps=1e-6,
  activation="gelu",
)  # fmt: skip
"""The image tower of InternVL 2 to 3.5, at 448 pixels."""
