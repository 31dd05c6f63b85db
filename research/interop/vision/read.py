"""Vision models in Hugging Face's format: read strictly, and written back."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import tree
from research.interop import hf, quantized
from research.interop.loaded import Loaded
from research.interop.vision import config as vision_config
from research.interop.vision import internvl, names
from research.io import safetensors, unread
from research.text.tokenizer import Tokenizer
from research.typing import Params, UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import vit
from research.vlm.encoders.text import TextEncoder
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.model import VisionLanguageModel

CONTRASTIVE = ("clip", "siglip")

PREPROCESSOR = "preprocessor_config.json"

# Tower -> what its names start with: as files have them, as transformers
# since 4.52 has them in memory, and with or without the inner model's name.
_VISION = re.compile(
  r"(model\.)?(vision_tower|vision_model)\.(vision_model\.)?"
)
_CONNECTOR = re.compile(r"(model\.)?(multi_modal_projector|connector)\.")
_LANGUAGE = (
  (re.compile(r"(model\.)?language_model\.lm_head\."), "lm_head."),
  (re.compile(r"(model\.)?language_model\.(model\.)?"), "model."),
  (re.compile(r"model\.text_model\."), "model."),
  (re.compile(r"lm_head\."), "lm_head."),
)

CONNECTOR_ROWS = {
  "llava": (
    *names.linear("up", "linear_1"),
    *names.linear("down", "linear_2"),
  ),
  "idefics3": (
    names.Row(
      "inner/project", "modality_projection.proj.weight", names.TRANSPOSED
    ),
  ),
  "paligemma": names.linear("project", "linear"),
  "gemma3": (
    names.Row("inner/project", "mm_input_projection_weight"),
    names.Row("norm/scale", "mm_soft_emb_norm.weight"),
  ),
  "internvl": (
    *names.norm("after", "layer_norm"),
    *names.linear("inner/up", "linear_1"),
    *names.linear("inner/down", "linear_2"),
  ),
}
CONNECTOR_ROWS["smolvlm"] = CONNECTOR_ROWS["idefics3"]

VISION_ROWS = {"internvl": internvl.VISION}
"""Family -> tensors of its image tower, if they are not `names.VISION`."""

WRITTEN = {
  "llava": ("vision_tower.vision_model.", "multi_modal_projector."),
  "paligemma": ("vision_tower.vision_model.", "multi_modal_projector."),
  "gemma3": ("vision_tower.vision_model.", "multi_modal_projector."),
  "idefics3": ("model.vision_model.", "model.connector."),
  "smolvlm": ("model.vision_model.", "model.connector."),
  "internvl": ("vision_tower.", "multi_modal_projector."),
}
"""Family -> prefixes of the image tower and of the connector in files."""


def vision_language_params(
  model: VisionLanguageModel,
  kind: str,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns the parameters of a vision language model out of a file's tensors.

  Args:
    model: what to fill.
    kind: one of `config.FAMILIES`.
    tensors: by their names; exactly the model's.
    dtype: of the result.
    where: the file or directory, for messages.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  towers = _towers(tensors, where)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rows = VISION_ROWS.get(kind, names.VISION)
  vision = read_tower(
    shapes["vision"], rows, towers["vision"], model.vision, dtype, where
  )
  connector = read_tower(
    shapes["connector"],
    CONNECTOR_ROWS[kind],
    towers["connector"],
    None,
    dtype,
    where,
  )
  language = hf.read_params(model.language, towers["language"], dtype, where)
  return dict(vision=vision, connector=connector, language=language)


def contrastive_params(
  model: DualEncoder,
  kind: str,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns the parameters of CLIP or SigLIP out of a file's tensors.

  Arguments and errors are those of `vision_language_params`.
  """
  image: dict[str, Any] = {}
  text: dict[str, Any] = {}
  scalars: dict[str, Any] = {}
  for name, tensor in tensors.items():
    if name in ("logit_scale", "logit_bias"):
      scalars[name] = tensor
    elif name in ("visual_projection.weight", "text_projection.weight"):
      into = image if name.startswith("visual") else text
      into["projection.weight"] = tensor
    elif name.startswith("vision_model."):
      image[name.removeprefix("vision_model.")] = tensor
    elif name.startswith("text_model."):
      text[name.removeprefix("text_model.")] = tensor
    else:
      raise hf.mismatch(where, [], [name])
  text_rows = names.CLIP_TEXT if kind == "clip" else names.SIGLIP_TEXT
  expected = {"logit_scale"} | ({"logit_bias"} if kind == "siglip" else set())
  if set(scalars) != expected:
    raise hf.mismatch(
      where, sorted(expected - set(scalars)), sorted(set(scalars) - expected)
    )
  shapes = jax.eval_shape(
    lambda: vit.new_params(model.image, jax.random.key(0))
  )
  text_shapes = jax.eval_shape(lambda: _init_text(model.text))
  out = {
    "image": read_tower(shapes, names.VISION, image, model.image, dtype, where),
    "text": read_tower(text_shapes, text_rows, text, model.text, dtype, where),
  }
  for name, tensor in scalars.items():
    out[name] = jnp.asarray(tensor.read(), dtype).reshape(())
  return out


def _init_text(model: TextEncoder) -> Params:
  tokens = jnp.zeros((1, model.length), jnp.int32)
  return model.init(jax.random.key(0), tokens)["params"]


def _towers(tensors, where) -> dict[str, dict[str, Any]]:
  out: dict[str, dict[str, Any]] = dict(vision={}, connector={}, language={})
  for name, tensor in tensors.items():
    tower, inner = _tower_of(name)
    if tower is None:
      raise hf.mismatch(where, [], [name])
    out[tower][inner] = tensor
  return out


def _tower_of(name: str) -> tuple[str | None, str]:
  """Returns the tower of a tensor, and its name within."""
  for tower, pattern in (("vision", _VISION), ("connector", _CONNECTOR)):
    if found := pattern.match(name):
      return tower, name[found.end() :]
  for pattern, plain in _LANGUAGE:
    if found := pattern.match(name):
      return "language", plain + name[found.end() :]
  return None, name


def read_tower(
  shapes: Params,
  rows: Iterable[names.Row],
  tensors: Mapping[str, quantized.Tensor],
  model: Any,
  dtype: str,
  where: Any,
) -> dict[str, Any]:
  """Returns a tower's parameters, its layers as runs.

  Args:
    shapes: of the parameters.
    rows: of the tower (`names.Row`).
    tensors: the file's, by their names within the tower; exactly the tower's.
    model: the tower, or None for one without layers.
    dtype: of the result.
    where: the file or directory, for messages.

  Raises:
    UserError: the tensors are not exactly the tower's.
  """
  try:
    outside, layers, used = names.read_tower(
      rows, *layer_shapes(shapes), tensors, dtype
    )
  except UserError as e:
    raise UserError(f"{where}: {e}") from e
  extra = [n for n in tensors if n not in used and n not in names.BUFFERS]
  if extra:
    raise hf.mismatch(where, [], extra)
  kinds = () if model is None else model.layer_kinds()
  params = tree.stack(
    unread.nested(outside), [unread.nested(layer) for layer in layers], kinds
  )
  return jax.tree.map(jnp.asarray, params)


def layer_shapes(
  shapes: Params,
) -> tuple[dict[str, tuple[int, ...]], list[dict[str, tuple[int, ...]]]]:
  """Returns the shapes outside of layers, and those of each layer, by path."""

  def flat(params, lead):
    return {k: x.shape[lead:] for k, x in tree.flatten_paths(params)}

  numbered = {
    number: flat(shapes[run][layer], 1)
    for run, layer, numbers in (
      (*name.split("/"), numbers)
      for name, numbers in tree.layer_indices(shapes).items()
    )
    for number in numbers
  }
  layers = [numbered[i] for i in range(len(numbered))]
  return flat(tree.outer_params(shapes), 0), layers


def model_from_directory(
  path: pathlib.Path, dtype: str = "float32"
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Returns the model in a directory, its parameters, and its config.json.

  Args:
    path: with config.json and safetensors, whose model type is one of
      `CONTRASTIVE` or of `config.FAMILIES`.
    dtype: of parameters and computation.
  """
  where = str(path / "config.json")
  config = safetensors.read_json(path / "config.json")
  tensors = safetensors.open_directory(path)
  kind = config.get("model_type")
  if kind in CONTRASTIVE:
    dual = vision_config.dual_encoder(config, where, dtype)
    return dual, contrastive_params(dual, kind, tensors, dtype, path), config
  model = vision_config.vision_language_model(config, where, dtype)
  params = vision_language_params(model, kind, tensors, dtype, path)
  return model, params, config


def load(path: pathlib.Path, dtype: str = "float32") -> Loaded:
  """Returns a vision language model with its tokenizer and preprocessor.

  Args:
    path: a directory whose model type is one of `config.FAMILIES`.
    dtype: of parameters and computation.
  """
  model, params, config = model_from_directory(path, dtype)
  words, preprocessor = None, None
  if (path / "tokenizer.json").is_file():
    words = Tokenizer.from_directory(path)
  if (path / PREPROCESSOR).is_file():
    side = getattr(model.connector, "side", 1)
    preprocessor = from_preprocessor_config(
      path / PREPROCESSOR, patch=model.vision.patch, pool=side
    )
    model = dataclasses.replace(model, normalise=preprocessor.normalise)
  source = dict(
    format="hf",
    path=str(path),
    model_type=config["model_type"],
    config=config,
  )
  return Loaded(model, params, words, source, preprocessor=preprocessor)


def language_of(loaded: Loaded, params: Params | None = None) -> Loaded:
  """Returns the language model of a vision language model alone.

  Args:
    loaded: the vision language model.
    params: of the language model, such as those that see images; by default
      its own.
  """
  return dataclasses.replace(
    loaded,
    model=loaded.model.language,
    params=loaded.params["language"] if params is None else params,
    preprocessor=None,
  )
