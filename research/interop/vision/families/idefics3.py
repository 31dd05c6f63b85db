"""Idefics3 and SmolVLM: pixel shuffle and a matrix (arXiv:2504.05299)."""

import dataclasses
from typing import Any

from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
)
from research.interop.vision.prefixes import Prefix, Prefixes
from research.vlm import connectors
from research.vlm.model import VisionLanguageModel


def _parts(parts: Parts) -> dict[str, Any]:
  linear = connectors.Linear(size=parts.language.width, bias=False)
  side = parts.fields.integer("scale_factor")
  return dict(connector=connectors.Squares(side=side, inner=linear))


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  del config
  return dict(scale_factor=model.connector.side)


IDEFICS3 = Family(
  model_type="idefics3",
  architecture="Idefics3ForConditionalGeneration",
  defaults=dict(image_token_id=128_257, scale_factor=2),
  image_token="image_token_id",
  towers=(towers.IDEFICS3,),
  language=Language("llama"),
  parts=_parts,
  fields=_fields,
  naming=Prefixes(
    (
      Prefix("vision", r"(model\.)?vision_model\.", "model.vision_model."),
      Prefix("connector", r"(model\.)?connector\.", "model.connector."),
      Prefix("language", r"model\.text_model\.", "model.text_model.", "model."),
      Prefix("language", r"lm_head\.", "lm_head.", "lm_head."),
    )
  ),
  language_module="model.text_model",
  connector_rows=(
    names.Row(
      "inner/project", "modality_projection.proj.weight", names.TRANSPOSED
    ),
  ),
)

SMOLVLM = dataclasses.replace(
  IDEFICS3,
  model_type="smolvlm",
  architecture="SmolVLMForConditionalGeneration",
  towers=(towers.SMOLVLM,),
)

FAMILIES = (IDEFICS3, SMOLVLM)
