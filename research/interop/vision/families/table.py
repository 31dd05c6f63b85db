"""The families, by model type; each is imported when it is used.

Importing this file is cheap: the loader asks it of any directory.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from research.errors import UserError

MODULES = {
  "gemma3": "research.interop.vision.families.gemma3",
  "gemma4": "research.interop.vision.families.gemma4",
  "llava": "research.interop.vision.families.llava",
  "idefics3": "research.interop.vision.families.idefics3",
  "smolvlm": "research.interop.vision.families.idefics3",
  "paligemma": "research.interop.vision.families.paligemma",
  "internvl": "research.interop.vision.families.internvl",
  "molmo2": "research.interop.vision.families.molmo2",
  "qwen2_vl": "research.interop.vision.families.qwen2_vl",
  "qwen2_5_vl": "research.interop.vision.families.qwen2_vl",
  "qwen3_vl": "research.interop.vision.families.qwen3_vl",
}
"""Model type -> the module whose `FAMILIES` has its row.

A model that several can describe is written as the first of them.
"""


ORIGINAL = {
  "mm_vision_tower": (
    "LLaVA's own naming (mm_projector, and an encoder elsewhere)",
    "transformers': load its conversion, such as llava-hf/llava-1.5-7b-hf",
  ),
  "mp_pixel_shuffle_factor": (
    "nanoVLM's own naming",
    "transformers', which has no nanoVLM; its shapes are a preset for"
    " experiments.plan",
  ),
}
"""A field of config.json -> whose files have it, and what to load instead."""

CONTRASTIVE = ("clip", "siglip", "siglip2")
"""Model types of two towers without a language model (`contrastive.KINDS`)."""


def check_naming(config: Mapping[str, Any], where: Any) -> None:
  """Checks that a file's tensors can have names that are known here.

  Raises:
    UserError: they have those of a model's first code.
  """
  for field, (found, expected) in ORIGINAL.items():
    if field in config:
      raise UserError(
        f"{where}: found {found}, by its {field}; expected {expected}"
      )


def family_of(kind: Any, where: Any = "config.json") -> Any:
  """Returns the `Family` of a model type.

  Raises:
    UserError: there is none.
  """
  # Imported late: its package imports JAX.
  from research.interop.hf.families import REFUSED

  if kind in REFUSED:
    raise UserError(f"{where}: model_type {kind!r} has {REFUSED[kind]}")
  if kind not in MODULES:
    raise UserError(
      f"{where}: model_type is {kind!r}, expected one of {', '.join(MODULES)}"
    )
  module = importlib.import_module(MODULES[kind])
  return next(row for row in module.FAMILIES if row.model_type == kind)
