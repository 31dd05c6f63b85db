"""PEFT's adapters of a vision language model: those of its language model."""

import dataclasses
import pathlib
from typing import Any

from research import tree
from research.interop import peft
from research.lora import wrap
from research.nn.transformer import Transformer
from research.typing import Params, UserError
from research.vlm.model import VisionLanguageModel

LANGUAGE = "language"


def language_model(model: Any, params: Params) -> tuple[Transformer, Params]:
  """Returns the language model, and its parameters with all adapters.

  Args:
    model: a vision language model, or a language model, which is returned.

  Raises:
    UserError: there are adapters on other modules, whose names in PEFT's files
      are not known.
  """
  if not isinstance(model, VisionLanguageModel):
    return model, params
  adapters, _ = tree.partition(params, wrap.TRAINABLE)
  others = sorted(
    path
    for path, _ in tree.flatten_paths(adapters)
    if not path.startswith(f"{LANGUAGE}/")
  )
  if others:
    raise UserError(
      f"PEFT's format: found an adapter on {others[0]}, expected adapters of"
      " the language model alone"
    )
  return model.language, params[LANGUAGE]


def open_adapter(
  directory: str | pathlib.Path, params: Params, model: Any
) -> tuple[dict[str, Any], Any]:
  """Returns (params, model) with PEFT's adapter; see `peft.open_adapter`.

  Args:
    model: a language model, or a vision language model, whose language model
      is adapted.

  Raises:
    UserError: as `peft.open_adapter`, or the model is neither.
  """
  if isinstance(model, VisionLanguageModel):
    own, language = peft.open_adapter(
      directory, params[LANGUAGE], model.language
    )
    made = dataclasses.replace(model, language=language)
    return {**params, LANGUAGE: own}, made
  if not isinstance(model, Transformer):
    raise UserError(
      f"{directory}: its base is a {type(model).__name__}, expected a language"
      " model or a vision language model"
    )
  return peft.open_adapter(directory, params, model)
