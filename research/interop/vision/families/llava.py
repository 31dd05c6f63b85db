"""LLaVA-1.5: CLIP's penultimate layer and an MLP (arXiv:2310.03744)."""

from typing import Any

from research.interop.vision import names, towers
from research.interop.vision.families.family import (
  Config,
  Family,
  Language,
  Parts,
)
from research.vlm import connectors
from research.vlm.encoders.vit import Features
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel


def _parts(parts: Parts) -> dict[str, Any]:
  fields = parts.fields
  layer = fields.get("vision_feature_layer")
  layers = layer if isinstance(layer, list) else [layer]
  if not layers or any(type(x) is not int for x in layers):
    raise fields.wrong("vision_feature_layer", "a number or numbers of layers")
  strategy = fields.get("vision_feature_select_strategy")
  if strategy not in ("default", "full"):
    raise fields.wrong("vision_feature_select_strategy", "default or full")
  has_class_token = parts.vision.class_token
  if strategy == "default" and not has_class_token:
    raise fields.wrong(
      "vision_feature_select_strategy",
      "full, where the encoder has no class token: transformers' default would"
      " leave the first patch out",
    )
  if not fields.flag("multimodal_projector_bias"):
    raise fields.wrong("multimodal_projector_bias", "true")
  return dict(
    connector=connectors.Mlp(
      size=parts.language.width,
      activation=towers.activation(fields, "projector_hidden_act"),
    ),
    features=Features(
      layers=tuple(layers),
      normed=False,
      class_token=has_class_token and strategy == "full",
    ),
    normalise=normalise.CLIP,
  )


def _fields(model: VisionLanguageModel, config: Config) -> dict[str, Any]:
  del config
  layers = model.features.layers
  left_out = model.vision.class_token and not model.features.class_token
  strategy = "default" if left_out else "full"
  return dict(
    vision_feature_layer=layers[0] if len(layers) == 1 else list(layers),
    vision_feature_select_strategy=strategy,
    projector_hidden_act=towers.activation_name(model.connector.activation),
    multimodal_projector_bias=True,
  )


LLAVA = Family(
  model_type="llava",
  architecture="LlavaForConditionalGeneration",
  defaults=dict(
    image_token_index=32_000,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
  ),
  image_token="image_token_index",
  towers=(towers.CLIP, towers.SIGLIP),
  language=Language("llama"),
  parts=_parts,
  fields=_fields,
  connector_rows=(
    *names.linear("up", "linear_1"),
    *names.linear("down", "linear_2"),
  ),
)

FAMILIES = (LLAVA,)
