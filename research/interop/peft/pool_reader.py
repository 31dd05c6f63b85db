"""Adapters for a pool, read from PEFT's directories and llama.cpp's files."""

import pathlib

import jax.numpy as jnp

from research import tree, weights
from research.interop.peft import gguf_adapter, peft_config
from research.lora.adapted import AdaptedTensor
from research.lora.optim import row_factors
from research.lora.optim.row_factors import Factors
from research.nn.transformer import Transformer
from research.typing import Params, UserError


def read(
  place: pathlib.Path, params: Params, model: Transformer, rank: int
) -> Factors:
  """Returns the factors of an adapter of the base `params`.

  Args:
    place: a directory in PEFT's format, or a .gguf file.
    params: the base, packed or not.
    model: of it.
    rank: the largest that is taken.

  Raises:
    UserError: it is damaged or does not fit, brings weights whole, or is no
      plain LoRA (`row_factors.of`).
  """
  adapted = gguf_adapter.load_any(place, params, model)
  saved = () if gguf_adapter.is_file(place) else _saved(place)
  before = tree.outer_params(params)
  for path, w in tree.outer_params(adapted).items():
    while isinstance(w, AdaptedTensor):
      w = w.w
    same = w is before[path] or _equal(w, before[path])
    saved = saved if same else (*saved, path)
  if saved:
    raise UserError(
      f"{place}: brings {', '.join(saved)} whole, which all rows of a batch "
      "share; use it alone"
    )
  try:
    return row_factors.of(adapted, rank)
  except UserError as error:
    raise UserError(f"{place}: {error}") from error


def _saved(place):
  """Returns what PEFT's directory `place` says it brings whole."""
  fields, _ = peft_config.read_config(place)
  saved = peft_config.whole_modules(fields)
  return saved if peft_config.bias_mode(fields) == "none" else (*saved, "bias")


def _equal(new, old):
  if isinstance(new, dict):
    return all(_equal(new[k], old[k]) for k in new)
  new, old = weights.dense(new), weights.dense(old)
  return new.shape == old.shape and bool(jnp.array_equal(new, old))
