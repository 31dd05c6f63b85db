"""Vision language models as tensors of Hugging Face's files."""

import pathlib
from typing import Any

import numpy as np

from research.interop import parts
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.hf import write as hf_write
from research.interop.loaded import Loaded
from research.interop.vision import config_write, families
from research.interop.vision.families import Family
from research.interop.vision.read import PREPROCESSOR
from research.interop.vision.tower_params import tower_tensors
from research.io import safetensors
from research.lora.merge import changes
from research.typing import Params, UserError
from research.vlm.encoders.qwen import FRAMES
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.presets import QWEN
from research.vlm.images.prompts import Wrapped
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.square import Square
from research.vlm.model import VisionLanguageModel


def vision_language_tensors(
  model: VisionLanguageModel,
  family: Family,
  params: Params,
  dtype: str = "float32",
) -> dict[str, np.ndarray]:
  """Returns every tensor under the name that the Hub's files have.

  Args:
    model: whose parameters `params` are.
    family: whose names they get.
    params: of all three towers; packed weights are decoded, adapters merged.
    dtype: of the tensors.
  """
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
  """Writes a vision language model as a Hugging Face directory.

  Args:
    directory: a new one.
    loaded: the model, its tokenizer and its preprocessor.
    params: of all three towers; packed weights are decoded, adapters merged.
    dtype: of the tensors.

  Raises:
    UserError: none of `families.MODULES` can describe it.
  """
  config = config_write.describe(loaded.model)
  config["torch_dtype"] = dtype
  family = families.family_of(config["model_type"])
  tensors = vision_language_tensors(loaded.model, family, params, dtype)
  directory.mkdir(parents=True, exist_ok=True)
  safetensors.write_directory(directory, tensors, safetensors.SHARD_SIZE)
  safetensors.write_json(directory / "config.json", config)
  if loaded.preprocessor is not None:
    safetensors.write_json(
      directory / PREPROCESSOR, preprocessor_config(loaded.preprocessor)
    )
  hf_tokenizer.write(directory, None, loaded.tokenizer)


def preprocessor_config(preprocessor: Preprocessor) -> dict[str, Any]:
  """Returns the preprocessor_config.json of images that are resized, no more.

  Raises:
    UserError: it cuts images into tiles, or puts other tokens around them than
      a family does.
  """
  tiling, around = preprocessor.tiling, preprocessor.layout
  if isinstance(tiling, Square) and around == Wrapped():
    own = dict(
      image_processor_type="SiglipImageProcessor",
      size=dict(height=tiling.tile, width=tiling.tile),
    )
  elif isinstance(tiling, Native) and around == QWEN:
    own = dict(
      image_processor_type="Qwen2VLImageProcessor",
      # Numbers of pixels, whatever they are called.
      size=dict(shortest_edge=tiling.least, longest_edge=tiling.most),
      patch_size=tiling.patch,
      merge_size=tiling.merge,
      temporal_patch_size=FRAMES,
    )
  else:
    raise UserError(
      f"{PREPROCESSOR}: found {type(tiling).__name__} and"
      f" {type(around).__name__}, expected Square and Wrapped(), or Native and"
      " Qwen's layout: others are read from published files, and not written"
      " yet"
    )
  numbers = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
  return own | dict(
    resample=numbers[tiling.resample],
    do_resize=True,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(preprocessor.normalise.mean),
    image_std=list(preprocessor.normalise.std),
  )
