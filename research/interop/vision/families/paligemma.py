"""PaliGemma: SigLIP, one matrix, and a prompt read both ways.

Beyer et al. 2024, arXiv:2407.07726.
"""

from typing import Any

from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
  field_of,
)
from research.vlm import connectors
from research.vlm.images.presets import PALIGEMMA as PROMPT
from research.vlm.masks import BidirectionalPrompt
from research.vlm.model import VisionLanguageModel


def _text(config: Config) -> dict[str, Any]:
  text = field_of(config, "text_config")
  # What it says of the prefix, which a mask says here.
  text.pop("use_bidirectional_attention", None)
  return text


def _parts(parts: Parts) -> dict[str, Any]:
  # The language model scales all its embeddings; soft tokens are not scaled.
  return dict(
    connector=connectors.Linear(size=parts.language.width),
    mask=BidirectionalPrompt(),
    scale=1 / parts.language.embed_scale,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  width = model.language.width
  return dict(
    vision_config=config["vision_config"] | dict(projection_dim=width),
    projection_dim=width,
    hidden_size=width,
  )


PALIGEMMA = Family(
  model_type="paligemma",
  architecture="PaliGemmaForConditionalGeneration",
  defaults=dict(image_token_index=256_000),
  image_token="image_token_index",
  towers=(towers.SIGLIP, towers.CLIP),
  language=Language("gemma", fields=_text),
  parts=_parts,
  fields=_fields,
  prompt=PROMPT,
  connector_rows=names.linear("project", "linear"),
)

FAMILIES = (PALIGEMMA,)
