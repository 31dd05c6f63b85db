"""Perplexity of a text under a model, by one standard.

The text is tokenised once, without special tokens, and cut into windows that
do not overlap, from position 0. Each window is read alone; its first token is
given, the others are predicted. A last partial window counts from two tokens
on. The perplexity is `exp` of the mean over all predicted tokens.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.transformer import Transformer
from research.typing import Array, Float, Int, Params, UserError

ROWS = 256
"""Positions whose logits exist at the same time."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """What `perplexity` returns.

  Attributes:
    perplexity: `exp(nll)`.
    nll: mean negative log-likelihood of a predicted token, in nats.
    tokens: how many were predicted.
    windows: how many windows they stand in.
    seconds: spent computing, compilation left out.
  """

  perplexity: float
  nll: float
  tokens: int
  windows: int
  seconds: float


def log_probs(
  model: Transformer, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B S"]:
  """Returns `log p(token | those before)` of tokens 1 .. T-1, in fp32.

  The logits of a few positions exist at a time, never `[B, T, V]`.
  """
  hidden, _ = model.apply({"params": params}, tokens)
  hidden, targets = hidden[:, :-1], tokens[:, 1:]
  flat = hidden.reshape(-1, hidden.shape[-1])
  count = flat.shape[0]
  rows = min(ROWS, count)
  chunks = -(-count // rows)
  flat = jnp.pad(flat, ((0, chunks * rows - count), (0, 0)))
  wanted = jnp.pad(targets.reshape(-1), (0, chunks * rows - count))

  def one(part):
    hidden, targets = part
    logits = model.apply({"params": params}, hidden, method="logits")
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=-1)

  parts = flat.reshape(chunks, rows, -1), wanted.reshape(chunks, rows)
  return jax.lax.map(one, parts).reshape(-1)[:count].reshape(targets.shape)


@functools.partial(jax.jit, static_argnames="model")
def _sums(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
  """Returns each window's summed log-likelihood; padding counts nothing."""
  found = log_probs(model, params, tokens)
  predicted = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
  return jnp.sum(jnp.where(predicted, found, 0.0), axis=-1)


def windows(
  ids: Sequence[int], window: int, max_windows: int | None = None
) -> list[Sequence[int]]:
  """Returns the windows of a text that count.

  Args:
    ids: the whole text's tokens.
    window: tokens a window.
    max_windows: how many at most, from the start; None for all.

  Raises:
    UserError: a window predicts nothing, or the text does not fill one.
  """
  if window < 2:
    raise UserError(f"window: found {window}, expected at least 2 tokens")
  if max_windows is not None and max_windows < 1:
    raise UserError(f"max_windows: found {max_windows}, expected at least 1")
  if len(ids) < window:
    raise UserError(
      f"text: found {len(ids)} tokens, expected at least one window of "
      f"{window}.\nGive a longer text, or --window={max(len(ids), 2)}."
    )
  cut = [ids[i : i + window] for i in range(0, len(ids), window)]
  return [w for w in cut[:max_windows] if len(w) >= 2]


def perplexity(
  model: Transformer,
  params: Params,
  ids: Sequence[int],
  window: int = 1024,
  max_windows: int | None = 8,
  batch: int = 1,
) -> Perplexity:
  """Returns the perplexity of a text.

  Args:
    model: the Transformer.
    params: its parameters.
    ids: the whole text's tokens.
    window: tokens a window; at most the model's context.
    max_windows: how many windows at most; None for all.
    batch: windows read at a time.
  """
  if batch < 1:
    raise UserError(f"batch: found {batch}, expected at least 1")
  if model.max_positions is not None and window > model.max_positions:
    raise UserError(
      f"window: found {window} tokens, expected at most the model's context "
      f"of {model.max_positions}"
    )
  parts = windows(ids, window, max_windows)
  batch = min(batch, len(parts))
  rows = -(-len(parts) // batch) * batch
  tokens = np.zeros((rows, window), np.int32)
  lengths = np.zeros((rows,), np.int32)
  for i, part in enumerate(parts):
    tokens[i, : len(part)], lengths[i] = part, len(part)
  compiled = _sums.lower(model, params, tokens[:batch], lengths[:batch])
  compiled = compiled.compile()
  start = time.perf_counter()
  sums = [
    compiled(params, tokens[i : i + batch], lengths[i : i + batch])
    for i in range(0, rows, batch)
  ]
  total = float(np.sum(np.asarray(jax.device_get(sums), np.float64)))
  seconds = time.perf_counter() - start
  count = int(np.sum(np.maximum(lengths - 1, 0)))
  nll = -total / count
  # A nonsense model is worse than any float: infinity then, not an error.
  value = math.exp(nll) if nll < 700 else math.inf
  return Perplexity(value, nll, count, len(parts), seconds)
