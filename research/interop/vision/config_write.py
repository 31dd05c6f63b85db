"""The config.json of vision language models, by reading it back.

It inverts `research.interop.vision.config`.
"""

import dataclasses
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import config, internvl
from research.typing import UserError
from research.vlm.encoders.vit import VisionTransformer
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel

_TOWERS = {"idefics3": "idefics3_vision", "smolvlm": "smolvlm_vision"}

ARCHITECTURES = {
  "llava": "LlavaForConditionalGeneration",
  "idefics3": "Idefics3ForConditionalGeneration",
  "smolvlm": "SmolVLMForConditionalGeneration",
  "paligemma": "PaliGemmaForConditionalGeneration",
  "gemma3": "Gemma3ForConditionalGeneration",
  "internvl": "InternVLForConditionalGeneration",
}
"""Model type -> the class of transformers."""


def config_of(model: VisionLanguageModel, kind: str) -> dict[str, Any]:
  """Returns the config.json of a model; inverts `vision_language_model`.

  Args:
    model: any.
    kind: one of `config.FAMILIES`.

  Raises:
    UserError: reading the result back would not give `model`.
  """
  language, [_, defaults] = model.language, config.FAMILIES[kind]
  activations = {ours: theirs for theirs, ours in config.ACTIVATIONS.items()}
  values = dict(
    model_type=kind,
    architectures=[ARCHITECTURES[kind]],
    text_config=hf_config.describe(language),
    vision_config=_vision_config(model.vision, kind),
    tie_word_embeddings=language.tied,
    torch_dtype=language.dtype,
    **{config.token_field(kind): model.image_token},
  )
  if kind == "llava":
    layers = model.features.layers
    values |= dict(
      vision_feature_layer=layers[0] if len(layers) == 1 else list(layers),
      vision_feature_select_strategy="full"
      if model.features.class_token
      else "default",
      projector_hidden_act=activations[
        getattr(model.connector, "activation", "gelu")
      ],
      multimodal_projector_bias=True,
    )
  if kind == "paligemma":
    values["vision_config"]["projection_dim"] = language.width
    values |= dict(projection_dim=language.width, hidden_size=language.width)
  if kind == "gemma3":
    table = model.vision.positions
    values["mm_tokens_per_image"] = model.connector.tokens(
      (table.rows, table.columns)
    )
  if "scale_factor" in defaults:
    values["scale_factor"] = getattr(model.connector, "side", 1)
  if kind == "internvl":
    values |= dict(
      downsample_ratio=1 / model.connector.side,
      image_seq_length=model.tokens_per_view(
        *values["vision_config"]["image_size"]
      ),
      projector_hidden_act=activations[model.connector.inner.activation],
      vision_feature_layer=model.features.layers[0],
    )
  again = config.vision_language_model(values, "the model's configuration")
  if _comparable(again) != _comparable(model):
    raise UserError(
      f"config.json of model_type {kind!r} cannot describe this vision language"
      " model: reading it back gives another one"
    )
  return values


def _vision_config(vision: VisionTransformer, kind: str) -> dict[str, Any]:
  if kind == "internvl":
    return internvl.vision_config(vision)
  block = vision.stack.blocks[0]
  activations = {ours: theirs for theirs, ours in config.ACTIVATIONS.items()}
  grid = vision.positions.rows if vision.positions is not None else 0
  tower = "clip" if vision.class_token else "siglip"
  values = dict(
    model_type=_TOWERS.get(kind, f"{tower}_vision_model"),
    hidden_size=vision.width,
    intermediate_size=block.mlp.hidden,
    num_hidden_layers=vision.stack.depth,
    num_attention_heads=block.attention.heads,
    num_channels=3,
    image_size=grid * vision.patch,
    patch_size=vision.patch,
    hidden_act=activations[block.mlp.activation],
    layer_norm_eps=vision.norm.eps,
  )
  if tower == "siglip":
    values["vision_use_head"] = vision.pooling is not None
  return values


def describe(model: VisionLanguageModel) -> dict[str, Any]:
  """Returns the config.json of the first family that can describe `model`.

  Raises:
    UserError: none of `config.FAMILIES` can.
  """
  for kind in config.FAMILIES:
    try:
      return config_of(model, kind)
    except (UserError, AttributeError, KeyError):
      continue
  tried = ", ".join(config.FAMILIES)
  raise UserError(
    f"no config.json describes this model; tried {tried}.\n"
    "Expected the encoder and the connector of one of these families."
  )


def _comparable(model: VisionLanguageModel) -> VisionLanguageModel:
  """Returns the model without what its files do not say."""
  return dataclasses.replace(
    model,
    vision=model.vision.clone(remat="none", dtype="float32"),
    language=model.language.clone(
      remat="none", dtype="float32", max_positions=None
    ),
    normalise=normalise.HALF,
  )
