"""Gemma 3: SigLIP, the mean of squares of patches, and images read both ways.

Gemma Team 2025, arXiv:2503.19786.
"""

import math
from typing import Any

from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
)
from research.nn.norm import RMSNorm
from research.vlm import connectors
from research.vlm.masks import BidirectionalImages
from research.vlm.model import VisionLanguageModel


def _parts(parts: Parts) -> dict[str, Any]:
  fields, table = parts.fields, parts.vision.positions
  tokens = fields.integer("mm_tokens_per_image")
  side = math.isqrt(tokens)
  if side * side != tokens or table.rows % side:
    raise fields.wrong(
      "mm_tokens_per_image",
      f"a square whose side divides {table.rows}, the patches of a side",
    )
  width, eps = parts.language.width, parts.vision.norm.eps
  return dict(
    connector=connectors.AveragePool(
      side=table.rows // side,
      norm=RMSNorm(eps=eps, offset=1.0),
      inner=connectors.Linear(size=width, bias=False),
    ),
    mask=BidirectionalImages(image_token=parts.image_token),
    scale=1 / parts.language.embed_scale,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  del config
  table = model.vision.positions
  tokens = model.connector.tokens((table.rows, table.columns))
  return dict(mm_tokens_per_image=tokens)


GEMMA3 = Family(
  model_type="gemma3",
  architecture="Gemma3ForConditionalGeneration",
  defaults=dict(image_token_index=262_144, mm_tokens_per_image=256),
  image_token="image_token_index",
  towers=(towers.SIGLIP, towers.CLIP),
  language=Language("gemma3_text"),
  parts=_parts,
  fields=_fields,
  connector_rows=(
    names.Row("inner/project", "mm_input_projection_weight"),
    names.Row("norm/scale", "mm_soft_emb_norm.weight"),
  ),
)

FAMILIES = (GEMMA3,)
