"""Adapters of either format by name: PEFT's directories and llama.cpp's files.

The working directory of a run stands for the adapter that it trained. A pool of
adapters (`research.lora.serving.pool`) reads them by `read_factors`.
"""

import os
import pathlib
from typing import Any

import jax.numpy as jnp

from research import tree, weights
from research.interop import load, peft
from research.interop.gguf import adapter as gguf_adapter
from research.interop.peft import config as peft_config
from research.lora.optim import row_factors
from research.lora.optim.row_factors import Factors
from research.nn.transformer import Transformer
from research.typing import Params, UserError
from research.vlm.image_conditioned import ImageConditioned


def is_gguf(place: str | os.PathLike) -> bool:
  """Whether a name is that of a GGUF file, not of PEFT's directory."""
  return pathlib.Path(place).suffix == ".gguf"


def locate(place: str | os.PathLike) -> pathlib.Path:
  """Returns the GGUF file or PEFT's directory that a name stands for.

  Args:
    place: one of these, or a run's working directory.

  Raises:
    UserError: a run that has trained no adapter.
  """
  path = pathlib.Path(place)
  if not (path / "config.gin").is_file():
    return path
  if (path / load.MODEL).is_dir() and not (path / "adapter").is_dir():
    raise UserError(
      f"{path}: this run trained a full model, expected an adapter; pass it "
      "as the model"
    )
  return load.adapter_directory(path) or path


def load_adapter(
  place: str | os.PathLike,
  params: Params,
  model: Transformer | ImageConditioned,
) -> dict[str, Any]:
  """Returns `params` under the adapter that a name stands for, see `locate`.

  Of a model that sees images, its language model is adapted.
  """
  if isinstance(model, ImageConditioned):
    own = load_adapter(place, params["language"], model.language)
    return {**params, "language": own}
  found = locate(place)
  read = gguf_adapter.load if is_gguf(found) else peft.load_adapter
  return read(found, params, model)


def read_factors(
  place: pathlib.Path, params: Params, model: Transformer, rank: int
) -> Factors:
  """Returns the factors of an adapter of the base `params`.

  Args:
    place: a directory in PEFT's format or of a run, or a .gguf file.
    rank: the largest that is taken.

  Raises:
    UserError: it is damaged or does not fit, brings weights whole, or is no
      plain LoRA (`row_factors.extract`).
  """
  place = locate(place)
  adapted = load_adapter(place, params, model)
  saved = () if is_gguf(place) else _saved(place)
  before = tree.outer_params(params)
  for path, w in tree.outer_params(adapted).items():
    *_, w = weights.nested(w)
    same = w is before[path] or _equal(w, before[path])
    saved = saved if same else (*saved, path)
  if saved:
    raise UserError(
      f"{place}: contains full weights of {', '.join(saved)} "
      "(modules_to_save), which all rows of a batch share; use it alone"
    )
  try:
    return row_factors.extract(adapted, rank)
  except UserError as error:
    raise UserError(f"{place}: {error}") from error


def _saved(place):
  fields, _ = peft_config.read_config(place)
  saved = peft_config.modules_to_save(fields)
  return saved if peft_config.bias_mode(fields) == "none" else (*saved, "bias")


def _equal(new, old):
  if isinstance(new, dict):
    return all(_equal(new[k], old[k]) for k in new)
  new, old = weights.dense(new), weights.dense(old)
  return new.shape == old.shape and bool(jnp.array_equal(new, old))
