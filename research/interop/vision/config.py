"""config.json of vision language models: of any family, to a model.

Fields that a file leaves out have the defaults of transformers' own
configuration classes. A model type that is not known is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from research.interop.vision import families
from research.interop.vision.families import Family, Parts
from research.io.fields import Fields
from research.vlm.model import VisionLanguageModel


def vision_language_model(
  config: Mapping[str, Any], where: str, dtype: str = "float32"
) -> VisionLanguageModel:
  """Returns the model of a config.json of one of `families.MODULES`.

  Raises:
    UserError: an unknown model type, an unsupported feature, or a field of the
      wrong type.
  """
  family = families.family_of(config.get("model_type"), where)
  fields = Fields(config, where, family.defaults)
  language = _language(family, config, where, dtype)
  vision = _vision(family, config, where, dtype)
  new_name = "image_token_id"
  named = new_name if new_name in config else family.image_token
  token = fields.integer(named, least=0)
  return VisionLanguageModel(
    vision=vision,
    language=language,
    image_token=token,
    **family.parts(Parts(fields, vision, language, token)),
  )


def _language(family: Family, config, where, dtype) -> Any:
  text = family.language.fields(config)
  text.setdefault("model_type", family.language.model_type)
  if "tie_word_embeddings" in config:
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
  return family.language.read(text, f"{where}: text_config", dtype)


def _vision(family: Family, config, where, dtype) -> Any:
  inner, where = family.vision_config(config), f"{where}: vision_config"
  kind = inner.get("model_type")
  for tower in family.towers:
    if kind in tower.model_types:
      return tower.read(inner, where, dtype)
  known = ", ".join(x for tower in family.towers for x in tower.model_types)
  raise Fields(inner, where).wrong("model_type", f"one of {known}")
