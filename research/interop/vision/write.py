"""Vision language models as tensors of Hugging Face's files."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from research import tree, weights
from research.interop import parts
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.hf import write as hf_write
from research.interop.loaded import Loaded
from research.interop.vision import config_write, names, read
from research.interop.vision.read import PREPROCESSOR
from research.io import safetensors
from research.lora.merge import changes
from research.typing import Params, UserError
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.prompts import Wrapped
from research.vlm.images.tiling.square import Square
from research.vlm.model import VisionLanguageModel

_INNER = {
  "model.": "language_model.model.",
  "lm_head.": "language_model.lm_head.",
}
_LANGUAGE = {
  "llava": _INNER,
  "paligemma": _INNER,
  "gemma3": _INNER,
  "internvl": _INNER,
  "idefics3": {"model.": "model.text_model.", "lm_head.": "lm_head."},
}
_LANGUAGE["smolvlm"] = _LANGUAGE["idefics3"]


def vision_language_tensors(
  model: VisionLanguageModel, kind: str, params: Params, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """Returns every tensor under the name that the Hub's files have.

  Args:
    model: whose parameters `params` are.
    kind: one of `config.FAMILIES`.
    params: of all three towers; packed weights are decoded, adapters merged.
    dtype: of the tensors.
  """
  vision, connector = read.WRITTEN[kind]
  rows = read.VISION_ROWS.get(kind, names.VISION)
  out = _prefixed(vision, tower_tensors(rows, params["vision"], dtype))
  out |= _prefixed(
    connector,
    tower_tensors(read.CONNECTOR_ROWS[kind], params["connector"], dtype),
  )
  pending = hf_write.tensors(
    model.language, parts.from_params(params["language"]), dtype, changes.Log()
  )
  for name, tensor in pending.items():
    plain = next(p for p in _LANGUAGE[kind] if name.startswith(p))
    theirs = _LANGUAGE[kind][plain] + name.removeprefix(plain)
    out[theirs] = np.asarray(tensor.make())
  return out


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
  return {prefix + name: x for name, x in tensors.items()}


def tower_tensors(
  rows: Iterable[names.Row], params: Params, dtype: str
) -> dict[str, np.ndarray]:
  """Returns a tower's tensors, by their names within it.

  Args:
    rows: of the tower.
    params: its parameters; packed weights are decoded.
    dtype: of the tensors.
  """

  def flat(subtree: Any) -> dict[str, np.ndarray]:
    return {
      path: np.asarray(weights.dense(w)).astype(dtype)
      for path, w in weights.named_weights(subtree)
    }

  layers = [flat(jax.tree.map(np.asarray, x)) for x in tree.layers(params)]
  return names.write_tower(rows, flat(tree.outer_params(params)), layers)


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
    UserError: no family of `config.FAMILIES` can describe it.
  """
  config = config_write.describe(loaded.model)
  config["torch_dtype"] = dtype
  tensors = vision_language_tensors(
    loaded.model, config["model_type"], params, dtype
  )
  directory.mkdir(parents=True, exist_ok=True)
  safetensors.write_directory(directory, tensors, safetensors.SHARD_SIZE)
  safetensors.write_json(directory / "config.json", config)
  if loaded.preprocessor is not None:
    safetensors.write_json(
      directory / PREPROCESSOR, preprocessor_config(loaded.preprocessor)
    )
  hf_tokenizer.write(directory, None, loaded.tokenizer)


def preprocessor_config(preprocessor: Preprocessor) -> dict[str, Any]:
  """Returns the preprocessor_config.json of images resized to a square.

  Raises:
    UserError: it cuts images into tiles, or puts tokens around them.
  """
  tiling, around = preprocessor.tiling, preprocessor.layout
  if not isinstance(tiling, Square) or around != Wrapped():
    raise UserError(
      f"{PREPROCESSOR}: found {type(tiling).__name__} and"
      f" {type(around).__name__}, expected Square and Wrapped(): others are"
      " read from published files, and not written yet"
    )
  numbers = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
  return dict(
    image_processor_type="SiglipImageProcessor",
    size=dict(height=tiling.tile, width=tiling.tile),
    resample=numbers[tiling.resample],
    do_resize=True,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(preprocessor.normalise.mean),
    image_std=list(preprocessor.normalise.std),
  )
