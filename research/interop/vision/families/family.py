"""What a family of vision language models is: the row of a model type."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision import names
from research.interop.vision.prefixes import Naming, like_llava
from research.interop.vision.towers import Tower
from research.io.fields import Fields
from research.nn import presets
from research.nn.transformer import Transformer
from research.vlm.images.prompts import PromptFormat
from research.vlm.model import VisionLanguageModel

Config = Mapping[str, Any]
"""A config.json, or an object in it."""


def field_of(config: Config, name: str) -> dict[str, Any]:
  """Returns a copy of the object in a field; empty if there is none."""
  return dict(config.get(name) or {})


def language_model(config: Config, where: str, dtype: str) -> Transformer:
  """Returns the language model of one of `hf.families.MODEL_TYPES`."""
  family, sizes = hf_config.sizes_from_config(config, where)
  return presets.transformer(family, sizes, dtype)


@dataclasses.dataclass(frozen=True)
class Language:
  """How a family's files describe the language model.

  Attributes:
    model_type: of text fields that do not say theirs.
    fields: config.json -> the text fields, a new dictionary.
    read: (text fields, their file and place, dtype) -> the model.
    write: the model -> its text fields.
  """

  model_type: str
  fields: Callable[[Config], dict[str, Any]] = functools.partial(
    field_of, name="text_config"
  )
  read: Callable[[Config, str, str], Any] = language_model
  write: Callable[[Any], dict[str, Any]] = hf_config.describe


@dataclasses.dataclass(frozen=True)
class Parts:
  """A config.json, taken apart.
  image_token: id of the placeholder, by whichever name the file has it.
  """

  fields: Fields
  vision: Any
  language: Any
  image_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A model type: its config.json, and the names of its tensors.

  Attributes:
    model_type: of config.json.
    architecture: the class of transformers, which other readers ask for.
    defaults: of fields that a file leaves out: those of transformers' own
      configuration class.
    image_token: the field that has the placeholder's id.
    vision_config: config.json -> what it says of the encoder, a new dictionary.
    towers: kinds of encoder that its files may have.
    language: how its files describe the language model.
    parts: the parts -> the other arguments of `VisionLanguageModel`.
    fields: (the model, config.json without these) -> further fields of
      config.json; with `parts`, both ways.
    prompt: what its prompts have beside images and text.
    naming: which tensor belongs to which tower.
    language_module: the language model in transformers' class, whose modules
      PEFT adapts by name; None if it fuses matrices that are several here.
    vision_rows: what the encoder's tensors are called.
    connector_rows: what the connector's tensors are called.
  """

  model_type: str
  architecture: str
  defaults: Config
  image_token: str
  vision_config: Callable[[Config], dict[str, Any]] = functools.partial(
    field_of, name="vision_config"
  )
  towers: Sequence[Tower]
  language: Language
  parts: Callable[[Parts], dict[str, Any]]
  fields: Callable[[VisionLanguageModel, Config], dict[str, Any]] = (
    lambda model, config: {}
  )
  prompt: PromptFormat = PromptFormat()
  naming: Naming = like_llava()
  language_module: str | None = "model.language_model"
  vision_rows: Sequence[names.Row] = names.VISION
  connector_rows: Sequence[names.Row]
