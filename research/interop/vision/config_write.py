"""The config.json of vision language models, by reading it back.

It inverts `research.interop.vision.config`.
"""

import dataclasses
from typing import Any

from flax import linen as nn

from research.interop.vision import config, families
from research.interop.vision.families import Family
from research.typing import UserError
from research.vlm.images import normalise
from research.vlm.model import VisionLanguageModel


def config_of(model: VisionLanguageModel, family: Family) -> dict[str, Any]:
  """Returns the config.json of a model; inverts `vision_language_model`.

  Raises:
    UserError: reading the result back would not give `model`.
  """
  language = model.language
  values: dict[str, Any] = dict(
    model_type=family.model_type,
    architectures=[family.architecture],
    text_config=family.language.write(language),
    vision_config=_vision_config(model, family),
    tie_word_embeddings=language.tied,
    torch_dtype=language.dtype,
  )
  values[family.image_token] = model.image_token
  values |= family.fields(model, values)
  again = config.vision_language_model(values, "the model's configuration")
  if _comparable(again) != _comparable(model):
    raise _undescribed(family)
  return values


def _vision_config(model: VisionLanguageModel, family: Family) -> dict:
  for tower in family.towers:
    if tower.describes(model.vision):
      return dict(model_type=tower.model_type) | tower.write(model.vision)
  raise _undescribed(family)


def _undescribed(family: Family) -> UserError:
  return UserError(
    f"config.json of model_type {family.model_type!r} cannot describe this"
    " vision language model: reading it back gives another one"
  )


def describe(model: VisionLanguageModel) -> dict[str, Any]:
  """Returns the config.json of the first family that can describe `model`.

  Raises:
    UserError: none of `families.MODULES` can.
  """
  for kind in families.MODULES:
    try:
      return config_of(model, families.family_of(kind))
    except (UserError, AttributeError, KeyError):
      continue
  tried = ", ".join(families.MODULES)
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
    connector=_as_published(model.connector),
  )


def _as_published(module: nn.Module) -> nn.Module:
  """Returns the module with the initializers that it has by default."""
  own: dict[str, Any] = {}
  for field in dataclasses.fields(module):
    value = getattr(module, field.name)
    if field.name == "kernel_init":
      own[field.name] = field.default
    elif isinstance(value, nn.Module) and field.name != "parent":
      own[field.name] = _as_published(value)
  return module.clone(**own)
