"""Vision models in Hugging Face's format: read strictly, and written back."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from research.interop import hf, quantized
from research.interop.loaded import Loaded
from research.interop.vision import config as vision_config
from research.interop.vision import contrastive, families
from research.interop.vision.families import Family
from research.interop.vision.tower_params import read_tower
from research.io import safetensors, unread
from research.text.tokenizer import Tokenizer
from research.typing import Params, UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.model import VisionLanguageModel

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"


def vision_language_params(
  model: VisionLanguageModel,
  family: Family,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str = "float32",
  where: Any = "model",
  shardings: unread.Shardings | None = None,
) -> dict[str, Any]:
  """Returns the parameters of a vision language model out of a file's tensors.

  The language model's are placed as they are read; towers are whole arrays in
  each process, which `placed` moves.

  Args:
    where: the file or directory, for messages.
    shardings: of the whole tree, see `unread.place`; with `unread.unplaced`
      towers are not read either.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  found = family.naming.split(tensors, where)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  towers = {name: shapes[name] for name in ("vision", "connector")}

  def of_language(language):
    return shardings(towers | dict(language=language))["language"]

  language = hf.read_params(
    model.language,
    found["language"],
    dtype,
    where,
    None if shardings is None else of_language,
  )
  if shardings is unread.unplaced:
    return towers | dict(language=language)
  out = {
    tower: read_tower(
      shapes[tower], rows, found[tower], getattr(model, tower), dtype, where
    )
    for tower, rows in (
      ("vision", family.vision_rows),
      ("connector", family.connector_rows),
    )
  }
  return out | dict(language=language)


def placed(loaded: Loaded, shardings: unread.Shardings | None) -> Loaded:
  """Returns a model with images whose towers, too, are where they go."""
  if shardings is None:
    return loaded
  return dataclasses.replace(
    loaded, params=unread.moved(loaded.params, shardings)
  )


def model_from_directory(
  path: pathlib.Path,
  dtype: str = "float32",
  config: Mapping[str, Any] | None = None,
  shardings: unread.Shardings | None = None,
) -> tuple[Any, dict[str, Any], Mapping[str, Any]]:
  """Returns the model in a directory, its parameters, and its config.json.

  Args:
    path: with config.json and safetensors, whose model type is one of
      `contrastive.KINDS` or of `families.MODULES`.

  Raises:
    UserError: it is quantized, or its tensors are not exactly the model's.
  """
  where = str(path / "config.json")
  if config is None:
    config = safetensors.read_json(path / "config.json")
  _check_plain(config, path)
  tensors = safetensors.open_directory(path)
  kind = config.get("model_type")
  if kind in contrastive.KINDS:
    dual = contrastive.dual_encoder(config, where, dtype)
    params = contrastive.contrastive_params(dual, kind, tensors, dtype, path)
    return dual, params, config
  model = vision_config.vision_language_model(config, where, dtype)
  family = families.family_of(kind, where)
  params = vision_language_params(
    model, family, tensors, dtype, path, shardings
  )
  return model, params, config


def load(
  path: pathlib.Path,
  dtype: str = "float32",
  config: Mapping[str, Any] | None = None,
  shardings: unread.Shardings | None = None,
) -> Loaded:
  """Returns a model with images, with its tokenizer and preprocessor.

  Args:
    path: a directory whose model type is one of `families.MODULES` or of
      `contrastive.KINDS`.
  """
  model, params, config = model_from_directory(path, dtype, config, shardings)
  words, preprocessor = None, None
  if (path / "tokenizer.json").is_file():
    words = Tokenizer.from_directory(path)
  described, dual = _preprocessor_file(path), isinstance(model, DualEncoder)
  if dual and described is not None:
    # CLIP's first files name no class that says the rest.
    named = "image_processor_type" in safetensors.read_json(described)
    described = described if named else None
  if described is not None:
    encoder = model.image if dual else model.vision
    side = 1 if dual else getattr(model.connector, "side", 1)
    preprocessor = from_preprocessor_config(
      described, patch=encoder.patch, pool=side
    )
    if not dual:
      preprocessor = dataclasses.replace(
        preprocessor, class_token=model.keeps_class_token
      )
      _check_placeholders(preprocessor, model, described)
      model = dataclasses.replace(model, normalise=preprocessor.normalise)
      # What the file says of prompts, or its class would.
      family = families.family_of(config["model_type"], str(path))
      preprocessor = dataclasses.replace(preprocessor, prompt=family.prompt)
  source = dict(
    format="hf",
    path=str(path),
    model_type=config["model_type"],
    config=config,
  )
  return Loaded(model, params, words, source, preprocessor=preprocessor)


def load_language(
  path: pathlib.Path,
  dtype: str = "float32",
  config: Mapping[str, Any] | None = None,
  shardings: unread.Shardings | None = None,
) -> Loaded:
  """Returns the language model of a vision language model alone."""
  of_all = shardings
  if shardings is not None and shardings is not unread.unplaced:

    def of_all(tree):
      return tree | {"language": shardings(tree["language"])}

  return language_of(load(path, dtype, config, of_all))


def _check_plain(config: Mapping[str, Any], path: pathlib.Path) -> None:
  """Raises UserError for a quantized model, whose tensors none of ours are."""
  quantization = quantized.split_config(config, path)[1]
  if quantization is not None:
    method = quantization.get("quant_method", "of no method")
    raise UserError(
      f"{path}: found a quantized model with images ({method}), expected one"
      " that is not.\nRead the original; only language models are read packed."
    )


def _preprocessor_file(path: pathlib.Path) -> pathlib.Path | None:
  if (path / PREPROCESSOR).is_file():
    return path / PREPROCESSOR
  # Files of Gemma 4 have it beside what becomes of videos and of sound.
  whole = path / PROCESSOR
  if whole.is_file() and "image_processor" in safetensors.read_json(whole):
    return whole
  return None


def _check_placeholders(
  preprocessor: Preprocessor, model: VisionLanguageModel, where: pathlib.Path
) -> None:
  try:
    model.check_placeholders(preprocessor)
  except UserError as e:
    raise UserError(f"{where}: {e}") from e


def language_of(loaded: Loaded, params: Params | None = None) -> Loaded:
  """Returns the language model of a vision language model alone.

  Args:
    params: of the language model, such as those that see images; by default
      its own.
  """
  return dataclasses.replace(
    loaded,
    model=loaded.model.language,
    params=loaded.params["language"] if params is None else params,
    preprocessor=None,
  )
