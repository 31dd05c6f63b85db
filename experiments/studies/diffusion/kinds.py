"""Two kinds of models of the same rows: the next token, and masks.

The mask is the last id; where next tokens are predicted it also begins rows, so
that a row's first token is predicted, too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.data.batches import batch_of
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.denoiser import NoCache
from research.diffusion.schedule import Linear
from research.nn.transformer import Transformer
from research.training import positions
from research.training.objectives.objective import Batch, NextToken, Objective
from research.typing import Array, Bool, Float, Int, Params

AR, DIFFUSION, CONVERTED = "next token", "diffusion", "converted"
KINDS = (AR, DIFFUSION, CONVERTED)
"""The last fills in masks after it has predicted next tokens: its logits are of
the place before (as Dream, arXiv:2508.15487)."""


def objective(kind: str, model: Transformer) -> Objective:
  """Returns what a kind of model is trained by."""
  if kind == AR:
    return NextToken(model=model, rows=2048)
  return MaskedDiffusion(
    model=model,
    mask_id=model.vocab_size - 1,
    schedule=Linear(),
    spread="even",
    shift=kind == CONVERTED,
    rows=2048,
  )


def pool(kind: str, rows: Int[np.ndarray, "N T"], mask_id: int) -> Batch:
  """Returns rows to train a kind of model on."""
  return batch_of(rows, begin=mask_id if kind == AR else None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def answers(
  model: Transformer,
  kind: str,
  params: Params,
  rows: Int[Array, "B T"],
  place: Int[Array, ""],
) -> Int[Array, " B"]:
  """Returns the likeliest tokens at a place, of what is before it or of all."""
  mask_id = model.vocab_size - 1
  if kind == AR:
    shifted = batch_of(rows, begin=mask_id)["tokens"]
    hidden, _ = model.apply({"params": params}, shifted)
    logits = model.apply({"params": params}, hidden, method="logits")
  else:
    valid = jnp.ones(rows.shape, bool)
    denoiser = NoCache(model=model, shift=kind == CONVERTED)
    logits = denoiser.scores(params, rows, valid)
  return jnp.argmax(logits[:, place, :mask_id], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(
  model: Transformer, params: Params, rows: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Returns log p of each token after those before it."""
  batch = batch_of(rows, begin=model.vocab_size - 1)
  hidden, _ = model.apply({"params": params}, batch["tokens"])
  return positions.log_probs(model, params, hidden, batch["targets"], 2048)


@functools.partial(jax.jit, static_argnums=0)
def scores(
  model: Transformer,
  params: Params,
  rows: Int[Array, "B T"],
  values: Int[Array, " V"],
  place: Int[Array, ""],
  counts: Bool[Array, " T"],
) -> Float[Array, "V B"]:
  """Returns log p of the tokens that count, with each value at a place."""

  def one(value):
    found = log_probs(model, params, rows.at[:, place].set(value))
    return jnp.where(counts, found, 0.0).sum(-1)

  return jax.lax.map(one, values)
