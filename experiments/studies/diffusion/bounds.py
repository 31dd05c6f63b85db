"""Bounds on -log p a token of tiny models, by masks of all numbers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from kernels_pallas.masks import Mask
from research.diffusion import process
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import masked_loss
from research.nn import output_head
from research.training.objectives.objective import Batch, Objective
from research.typing import Array, Bool, Float, Int, Params, PRNGKey


def loss(objective: Objective, params: Params, batch: Batch) -> float:
  """Returns an objective's mean, nothing random."""
  total, weight = _sums(objective, params, batch, None)
  return float(total / weight)


def passes(
  objective: Objective,
  params: Params,
  batches: Sequence[Batch],
  keys: Sequence[PRNGKey | None],
) -> tuple[float, float]:
  """Returns an objective's mean over batches, and its standard error.

  Args:
    objective: what is measured.
    params: of its model.
    batches: of one shape.
    keys: of passes over all of them, each with noise of its own, by which the
      error is known; one pass has none: 0.
  """
  found = []
  for key in keys:
    total = weight = 0.0
    for i, batch in enumerate(batches):
      own = None if key is None else jax.random.fold_in(key, i)
      one, count = _sums(objective, params, batch, own)
      total, weight = total + float(one), weight + float(count)
    found.append(total / weight)
  error = stats.sem(found) if found[1:] else 0.0
  return float(np.mean(found)), float(error)


@functools.partial(jax.jit, static_argnums=0)
def _sums(objective, params, batch, key):
  return objective(params, batch, key)[:2]


@functools.partial(jax.jit, static_argnums=(0, 3))
def bound(
  objective: Any, params: Params, batch: Any, block: int
) -> Float[Array, ""]:
  """Returns the bound a token, by so many masks of each block, all of them.

  Every number of masks 1 to K counts alike, with one draw of places for each
  row: `K/n` times the cross-entropy of the n masked tokens (`likelihood`).

  Args:
    objective: `MaskedDiffusion` or `BlockDiffusion`.
    params: of its model.
    batch: rows.
    block: K, tokens of a block.
  """
  tokens = batch["tokens"]

  def one(n):
    masked, counts = masks(
      jax.random.fold_in(jax.random.key(3), n), tokens, n, block
    )
    hidden, head = states(objective, params, batch, masked)
    return (
      masked_loss(
        objective.model,
        head,
        hidden,
        tokens,
        counts,
        objective.mask_id,
        4096,
      )
      / tokens.size
    )

  return jax.lax.map(one, jnp.arange(1, block + 1)).mean()


def masks(
  key: PRNGKey, tokens: Int[Array, "B T"], n: Any, block: int
) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
  """Returns n masks a block, and what each of them counts."""
  shape = (tokens.size // block, block)
  keys = jax.random.split(key, shape[0])
  count = jnp.full(shape[0], n)
  masked = process.mask_count(keys, jnp.ones(shape, bool), count)
  masked = masked.reshape(tokens.shape)
  return masked, jnp.where(masked, block / n, 0.0)


def states(
  objective: Any, params: Params, batch: Batch, masked: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Params]:
  """Returns the states that predict each place's token, see `output_head`."""
  if isinstance(objective, BlockDiffusion):
    return objective.states(params, batch, masked)
  noisy = process.noisy(batch["tokens"], masked, objective.mask_id)
  mask = Mask.full(segments=batch["segments"])
  return output_head.head_inputs(
    objective.model, params, noisy, batch["positions"], mask
  )
