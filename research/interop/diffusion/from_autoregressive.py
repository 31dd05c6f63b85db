"""From next-token prediction to filling in masks: what changes, and what not.

The weights stay. A token is still predicted by the state before it (`shift`,
as in Dream and DiffuCoder), so what the model knows is where it was; what is
new is a mask token: an id that texts do not use, or a row of its own, the mean
of the others. With blocks of one token the result is the same autoregressive
model; with larger ones it has to be trained (`block.BlockDiffusion`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import weights
from research.interop import parts, sources
from research.interop.diffusion.spec import FIELD, Spec, from_config
from research.interop.hf import write as hf_write
from research.lora.merge import changes
from research.nn.transformer import Transformer
from research.quant import untied_embedding
from research.typing import Params, UserError

_OF_TOKENS = {"embed": 0, "head": 1}
"""Weights with a row or a column for each token -> which axis that is."""


def to_diffusion(
  model: Transformer,
  params: Params,
  mask: int | None = None,
  block: int | None = None,
  end: tuple[int, ...] = (),
) -> tuple[Transformer, Params, Spec]:
  """Returns an autoregressive model as one that fills in masks.

  Args:
    mask: an id that texts do not use; None for a new one, after the others.

  Raises:
    UserError: there is no such id, or it ends texts.
  """
  grown, spec = _planned(model, mask, block, end)
  if mask is None:
    params = dict(params) | {
      name: untied_embedding.map_matrices(
        lambda w, axis=axis: _longer(weights.dense(w), axis), params[name]
      )
      for name, axis in _OF_TOKENS.items()
      if name in params
    }
  return grown, params, spec


def source_to_diffusion(
  given: sources.Source,
  mask: int | None = None,
  block: int | None = None,
) -> sources.Source:
  """Returns a model that is to be converted as one that fills in masks.

  Raises:
    UserError: there is no such id, or it is a diffusion model already.
  """
  config = given.config or hf_write.config_json(given.model, None, None)
  if from_config(config) is not None:
    raise UserError(
      f"{given.origin.get('path')}: is a diffusion model already; convert it "
      "without a mask token"
    )
  end = given.tokenizer.stop if given.tokenizer else ()
  model, spec = _planned(given.model, mask, block, tuple(end))
  config = dict(config) | {
    "vocab_size": model.vocab_size,
    FIELD: spec.to_config(),
  }
  if mask is not None:
    return dataclasses.replace(given, config=config)
  return dataclasses.replace(
    given,
    model=model,
    parts={a: _grown(a.path, p) for a, p in given.parts.items()},
    params=lambda: to_diffusion(given.model, given.params(), mask)[1],
    config=config,
  )


def _planned(model, mask, block, end) -> tuple[Transformer, Spec]:
  size = model.vocab_size
  if mask is None:
    model, mask = model.clone(vocab_size=size + 1), size
  if not 0 <= mask < size + 1 or mask >= model.vocab_size:
    raise UserError(
      f"mask: found id {mask}, expected one of 0 to {size - 1}, or none for a "
      "new one"
    )
  if mask in end:
    raise UserError(
      f"mask: id {mask} ends texts, expected one that they do not use"
    )
  return model, Spec(mask_id=mask, shift=True, block=block, end=end)


def _longer(x: Any, axis: int) -> Any:
  """Returns a matrix with the mean of its rows, or columns, behind them."""
  host = isinstance(x, np.ndarray)
  xp = np if host else jnp
  mean = x.astype(np.float32).mean(axis, keepdims=True).astype(x.dtype)
  return xp.concatenate([x, mean], axis=axis)


def _grown(path: str, part: parts.Part) -> parts.Part:
  if path not in _OF_TOKENS:
    return part
  axis = _OF_TOKENS[path]
  shape = tuple(n + (i == axis) for i, n in enumerate(part.shape))

  def longer(w):
    return _longer(changes.dense_weight(w).array, axis)

  kept = part.kind == parts.UNTIED or not part.packed
  return parts.Part(
    shape,
    part.kind if kept else "float32",
    lambda: untied_embedding.map_matrices(longer, part.read()),
  )
