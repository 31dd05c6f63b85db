"""Qwen's image towers: patches of native resolution, rotated by row and column.

They read videos as well, two frames at a time; an image is a frame twice.
"""

import functools
from collections.abc import Sequence

from research.nn.attention import Attention
from research.nn.block import Block
from research.nn.mlp import Mlp, PlainMlp
from research.nn.norm import LayerNorm, Norm, RMSNorm
from research.nn.rope import Rope, Spatial
from research.nn.stack import Stack
from research.typing import UserError
from research.vlm.encoders.positions import InterpolatedTable, Positions
from research.vlm.encoders.presets import EncoderSizes
from research.vlm.encoders.vit import VisionTransformer
from research.vlm.encoders.windows import WindowedBlock

FRAMES = 2

EPS = 1e-6
"""Of all norms, of all three; no file says it."""


def _block(
  sizes: EncoderSizes, mlp: Mlp | PlainMlp, norm: Norm, window: int = 0
) -> Block:
  kind = Block
  if window:
    kind = functools.partial(WindowedBlock, side=window)
  return kind(
    attention=Attention(
      heads=sizes.heads,
      kv_heads=sizes.heads,
      head_dim=sizes.width // sizes.heads,
      rope=Rope(axes=Spatial()),
      qkv_bias=True,
      out_bias=True,
    ),
    mlp=mlp,
    norm=norm,
  )


def _tower(
  sizes: EncoderSizes,
  blocks: Sequence[Block],
  positions: Positions | None,
  dtype: str,
) -> VisionTransformer:
  return VisionTransformer(
    width=sizes.width,
    patch=sizes.patch,
    stack=Stack(sizes.depth, tuple(blocks)),
    positions=positions,
    frames=FRAMES,
    patch_bias=positions is not None,
    norm=None,
    dtype=dtype,
  )


def qwen2_vl(
  sizes: EncoderSizes, *, dtype: str = "float32"
) -> VisionTransformer:
  """Returns Qwen2-VL's image tower (Wang et al. 2024, arXiv:2409.12191).

  Args:
    sizes: of the tower; its grid is not used.
  """
  mlp = PlainMlp(
    hidden=sizes.hidden, activation=sizes.activation or "quick_gelu"
  )
  block = _block(sizes, mlp, LayerNorm(eps=EPS))
  return _tower(sizes, (block,), None, dtype)


def qwen2_5_vl(
  sizes: EncoderSizes,
  *,
  window: int = 8,
  full: Sequence[int] = (7, 15, 23, 31),
  dtype: str = "float32",
) -> VisionTransformer:
  """Returns Qwen2.5-VL's image tower (Bai et al. 2025, arXiv:2502.13923).

  Args:
    sizes: of the tower; its grid is not used.
    window: side of the windows, in patches.
    full: numbers of the layers without windows, from 0.

  Raises:
    UserError: `full` names a layer that is not there.
  """
  if any(not 0 <= i < sizes.depth for i in full):
    raise UserError(
      f"full: found layers {tuple(full)}, expected numbers below {sizes.depth},"
      " the number of layers"
    )
  mlp = Mlp(
    hidden=sizes.hidden, activation=sizes.activation or "silu", bias=True
  )
  kinds = [0 if i in full else window for i in range(sizes.depth)]
  period = next(
    p
    for p in range(1, sizes.depth + 1)
    if all(kind == kinds[i % p] for i, kind in enumerate(kinds))
  )
  blocks = [
    _block(sizes, mlp.clone(), RMSNorm(eps=EPS), kind)
    for kind in kinds[:period]
  ]
  return _tower(sizes, blocks, None, dtype)


def qwen3_vl(
  sizes: EncoderSizes, *, dtype: str = "float32"
) -> VisionTransformer:
  """Returns Qwen3-VL's image tower (arXiv:2511.21631).

  Args:
    sizes: of the tower; its grid is that of the learned positions.
  """
  mlp = PlainMlp(
    hidden=sizes.hidden, activation=sizes.activation or "gelu_tanh"
  )
  block = _block(sizes, mlp, LayerNorm(eps=EPS))
  table = InterpolatedTable(sizes.grid, sizes.grid)
  return _tower(sizes, (block,), table, dtype)
