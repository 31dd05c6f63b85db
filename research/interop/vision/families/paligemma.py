"""PaliGemma: SigLIP, one matrix, and a prompt read both ways.

Beyer et al. 2024, arXiv:2407.07726.
"""

from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
  field_of,
)
from research.nn.transformer import Transformer
from research.vlm import connectors
from research.vlm.images.presets import PALIGEMMA as PROMPT
from research.vlm.masks import BidirectionalPrompt
from research.vlm.model import VisionLanguageModel


def _text(config: Config) -> dict[str, Any]:
  text = field_of(config, "text_config")
  # What it says of the prefix, which a mask says here.
  text.pop("use_bidirectional_attention", None)
  # Gemma 2's windows: PaliGemma 2 was trained and published without them
  # (big_vision's models/ppp/gemma.py), whatever its files inherit.
  return text | dict(sliding_window=None)


def _write_text(model: Transformer) -> Config:
  text = hf_config.describe(model)
  if text["model_type"] == "gemma2":
    # Of no layer; transformers does not build a mask without it.
    text["sliding_window"] = text["max_position_embeddings"]
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
  language=Language("gemma", fields=_text, write=_write_text),
  parts=_parts,
  fields=_fields,
  prompt=PROMPT,
  connector_rows=names.linear("project", "linear"),
)

FAMILIES = (PALIGEMMA,)
