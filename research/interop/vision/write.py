"""Vision language models as tensors of Hugging Face's files."""

import pathlib
from typing import Any

import numpy as np

from research.interop import parts
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.hf import write as hf_write
from research.interop.loaded import Loaded
from research.interop.vision import config_write, contrastive, families
from research.interop.vision.families import Family
from research.interop.vision.read import PREPROCESSOR
from research.interop.vision.tower_params import tower_tensors
from research.io import safetensors
from research.lora.merge import changes
from research.typing import Params, UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders.qwen import FRAMES
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.presets import GEMMA4, INTERNVL, MOLMO2, QWEN
from research.vlm.images.prompts import (
  RowsAndColumns,
  WholeAndCrops,
  Wrapped,
)
from research.vlm.images.tiling.budget import Budget
from research.vlm.images.tiling.centre_crop import CentreCrop
from research.vlm.images.tiling.idefics3 import Idefics3
from research.vlm.images.tiling.internvl import InternVL
from research.vlm.images.tiling.naflex import NaFlex
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.pad_to_square import PadToSquare
from research.vlm.images.tiling.pan_and_scan import PanAndScan
from research.vlm.images.tiling.square import Square
from research.vlm.model import VisionLanguageModel


def vision_language_tensors(
  model: VisionLanguageModel,
  family: Family,
  params: Params,
  dtype: str = "float32",
) -> dict[str, np.ndarray]:
  """Returns every tensor under the name that the Hub's files have."""
  pending = hf_write.tensors(
    model.language, parts.from_params(params["language"]), dtype, changes.Log()
  )
  return family.naming.join(
    {
      "vision": tower_tensors(family.vision_rows, params["vision"], dtype),
      "connector": tower_tensors(
        family.connector_rows, params["connector"], dtype
      ),
      "language": {k: np.asarray(x.make()) for k, x in pending.items()},
    }
  )


def write_model(
  directory: pathlib.Path,
  loaded: Loaded,
  params: Params,
  dtype: str = "float32",
) -> None:
  """Writes a model with images as a Hugging Face directory.

  Args:
    loaded: the model, its tokenizer and its preprocessor. A vision language
      model, or a contrastive one of two towers.
    params: of all towers; packed weights are decoded, adapters merged.

  Raises:
    UserError: none of `families.MODULES`, or of `contrastive.KINDS`, can
      describe it.
  """
  if isinstance(loaded.model, DualEncoder):
    config = contrastive.contrastive_config(loaded.model)
    kind = config["model_type"]
    tensors = contrastive.contrastive_tensors(kind, params, dtype)
  else:
    config = config_write.describe(loaded.model)
    family = families.family_of(config["model_type"])
    how = loaded.preprocessor
    if how is not None and how.prompt != family.prompt:
      raise UserError(
        f"Preprocessor.prompt: found {how.prompt}, expected {family.prompt}, as"
        f" who reads a directory of model type {family.model_type} makes"
        " prompts"
      )
    tensors = vision_language_tensors(loaded.model, family, params, dtype)
  config["torch_dtype"] = dtype
  directory.mkdir(parents=True, exist_ok=True)
  safetensors.write_directory(directory, tensors, safetensors.SHARD_SIZE)
  safetensors.write_json(directory / "config.json", config)
  if loaded.preprocessor is not None:
    safetensors.write_json(
      directory / PREPROCESSOR, preprocessor_config(loaded.preprocessor)
    )
  hf_tokenizer.write(directory, None, loaded.tokenizer)


def _square(tiling: Any) -> dict[str, int]:
  return dict(height=tiling.tile, width=tiling.tile)


PREPROCESSORS = (
  (
    Square,
    Wrapped(),
    lambda tiling: dict(
      image_processor_type="SiglipImageProcessor", size=_square(tiling)
    ),
  ),
  (
    Square,
    WholeAndCrops(),
    lambda tiling: dict(
      image_processor_type="Gemma3ImageProcessor",
      size=_square(tiling),
      do_pan_and_scan=False,
    ),
  ),
  (
    PanAndScan,
    WholeAndCrops(),
    lambda tiling: dict(
      image_processor_type="Gemma3ImageProcessor",
      size=_square(tiling),
      do_pan_and_scan=True,
      pan_and_scan_min_ratio_to_activate=tiling.ratio,
      pan_and_scan_min_crop_size=tiling.min_crop,
      pan_and_scan_max_num_crops=tiling.most_crops,
    ),
  ),
  (
    CentreCrop,
    Wrapped(),
    lambda tiling: dict(
      image_processor_type="CLIPImageProcessor",
      size=dict(shortest_edge=tiling.shortest),
      do_center_crop=True,
      crop_size=_square(tiling),
    ),
  ),
  (
    PadToSquare,
    Wrapped(),
    lambda tiling: dict(
      image_processor_type="LlavaImageProcessor",
      size=dict(shortest_edge=tiling.tile),
      do_center_crop=True,
      crop_size=_square(tiling),
      do_pad=True,
    ),
  ),
  (
    Idefics3,
    RowsAndColumns(),
    lambda tiling: dict(
      image_processor_type="Idefics3ImageProcessor",
      size=dict(longest_edge=tiling.longest),
      max_image_size=dict(longest_edge=tiling.tile),
      do_image_splitting=tiling.splitting == "tiles",
    ),
  ),
  (
    InternVL,
    INTERNVL,
    lambda tiling: dict(
      image_processor_type="GotOcr2ImageProcessor",
      size=_square(tiling),
      crop_to_patches=True,
      min_patches=tiling.min_tiles,
      max_patches=tiling.max_tiles,
    ),
  ),
  (
    NaFlex,
    Wrapped(),
    lambda tiling: dict(
      image_processor_type="Siglip2ImageProcessor",
      patch_size=tiling.patch,
      max_num_patches=tiling.budget,
    ),
  ),
  (
    Native,
    QWEN,
    lambda tiling: dict(
      image_processor_type="Qwen2VLImageProcessor",
      # Numbers of pixels, whatever they are called.
      size=dict(
        shortest_edge=tiling.min_pixels, longest_edge=tiling.max_pixels
      ),
      patch_size=tiling.patch,
      merge_size=tiling.merge,
      temporal_patch_size=FRAMES,
    ),
  ),
  (
    Budget,
    GEMMA4,
    lambda tiling: dict(
      image_processor_type="Gemma4ImageProcessor",
      patch_size=tiling.patch,
      pooling_kernel_size=tiling.pool,
      max_soft_tokens=tiling.budget,
    ),
  ),
  (
    Overlap,
    MOLMO2,
    lambda tiling: dict(
      image_processor_type="Molmo2ImageProcessor",
      size=_square(tiling),
      max_crops=tiling.max_tiles,
      overlap_margins=list(tiling.margins),
      patch_size=tiling.patch,
      pooling_size=[tiling.pool, tiling.pool],
    ),
  ),
)
"""A tiling, what stands around its images, and its fields. Others have no class
of transformers, or no family here."""

# `bilinear_sampled` is what Molmo 2's processor means by bilinear.
_FILTERS = dict(lanczos=1, bilinear=2, bilinear_sampled=2, bicubic=3)


def preprocessor_config(preprocessor: Preprocessor) -> dict[str, Any]:
  """Returns the preprocessor_config.json of one of `PREPROCESSORS`.

  Raises:
    UserError: it cuts images otherwise, or puts other tokens around them than
      a family does, or reading the file back would not give it.
  """
  tiling, around = preprocessor.tiling, preprocessor.layout
  for kind, layout, own in PREPROCESSORS:
    if isinstance(tiling, kind) and around == layout:
      values = own(tiling) | dict(
        resample=_FILTERS[tiling.resample],
        do_resize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(preprocessor.normalise.mean),
        image_std=list(preprocessor.normalise.std),
      )
      # Files do not say patch and pool of a square: config.json does.
      pool = getattr(tiling, "pool", 1)
      again = from_preprocessor_config(values, patch=tiling.patch, pool=pool)
      if again.tiling != tiling:
        raise UserError(
          f"{PREPROCESSOR}: found {tiling}, of which the file would make"
          f" {again.tiling}"
        )
      return values
  known = ", ".join(kind.__name__ for kind, _, _ in PREPROCESSORS)
  raise UserError(
    f"{PREPROCESSOR}: found {type(tiling).__name__} and"
    f" {type(around).__name__}, expected one of {known}, with the layout of its"
    " family"
  )
