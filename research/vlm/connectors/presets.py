"""Published connectors as rows: a new one is a new row.

Each row makes the connector for a language model of width `size` and features
of width `features`. Activations and norms are those of the published weights.
"""

import math
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from research.nn.norm import LayerNorm, RMSNorm, UnitRMS
from research.vlm.connectors.deep_stack import DeepStack
from research.vlm.connectors.group_attention import GroupAttention
from research.vlm.connectors.projections import (
  AveragePool,
  Linear,
  Mlp,
  Squares,
  Standardise,
)
from research.vlm.connectors.qformer import qformer
from research.vlm.connectors.resamplers import PerceiverResampler
from research.vlm.connectors.square_attention import SquareAttention


def _internvl(size: int, features: int) -> Squares:
  del features
  return Squares(side=2, inner=Mlp(size=size), after=LayerNorm(eps=1e-5))


def _qwen2_vl(size: int, features: int, norm: Any = None) -> Squares:
  inner = Mlp(size=size, hidden=4 * features)
  return Squares(side=2, inner=inner, before=norm or LayerNorm(eps=1e-6))


def _qwen3_vl(size: int, features: int) -> DeepStack:
  # Features of the output and of three layers before it.
  def merger(**norm):
    return Squares(side=2, inner=Mlp(size=size, hidden=features), **norm)

  return DeepStack(
    first=merger(before=LayerNorm(eps=1e-6)),
    deeper=tuple(merger(after=LayerNorm(eps=1e-6)) for _ in range(3)),
  )


def _gemma4(
  size: int, features: int, standardise: Standardise | None = None
) -> AveragePool:
  return AveragePool(
    side=3,
    norm=UnitRMS(eps=1e-6),
    inner=Linear(size=size, bias=False),
    factor=math.sqrt(features),
    standardise=standardise,
  )


CONNECTORS: dict[str, Callable[[int, int], Any]] = {
  "llava": lambda size, features: Linear(size=size),
  "llava-1.5": lambda size, features: Mlp(size=size),
  "paligemma": lambda size, features: Linear(
    size=size, kernel_init=nn.initializers.zeros
  ),
  "smolvlm-256m": lambda size, features: Squares(
    side=4, inner=Linear(size=size, bias=False)
  ),
  "smolvlm-2.2b": lambda size, features: Squares(
    side=3, inner=Linear(size=size, bias=False)
  ),
  "nanovlm": lambda size, features: Squares(
    side=2, inner=Linear(size=size, bias=False)
  ),
  "internvl": _internvl,
  "qwen2-vl": _qwen2_vl,
  "qwen2.5-vl": lambda size, features: _qwen2_vl(
    size, features, RMSNorm(eps=1e-6)
  ),
  "qwen3-vl": _qwen3_vl,
  "gemma3": lambda size, features: AveragePool(
    side=4,
    norm=RMSNorm(eps=1e-6, offset=1.0),
    inner=Linear(size=size, bias=False),
  ),
  "gemma4": _gemma4,
  "gemma4-31b": lambda size, features: _gemma4(size, features, Standardise()),
  "molmo2-4b": lambda size, features: GroupAttention(
    size=size, hidden=9_728, width=1_152
  ),
  "molmo": lambda size, features: SquareAttention(size=size, hidden=11_008),
  "flamingo": lambda size, features: PerceiverResampler(size=None),
  "blip-2": lambda size, features: qformer(size),
}
"""Model -> its connector. Molmo's `hidden` is that of its 7B models.

Flamingo's is for cross-attention: soft tokens as wide as the features.
"""
