"""Perplexity of a text under a model, over non-overlapping windows.

The text is tokenised once, without special tokens, and split into
non-overlapping windows. Each window is evaluated independently: its first token
is given, the others are predicted. A last partial window, which may be the
first, counts if it has at least two tokens. The perplexity is `exp` of the mean
negative log-likelihood of all predicted tokens.

`begin` puts special tokens before each window, for models that were trained
with them in every row. They come in addition to the window's tokens, and the
same tokens are predicted.

With `chunk`, a window is processed through a cache, that many tokens at a time,
as in generation. Later chunks attend to the cached (possibly quantized) keys
and values of a chunk; the chunk itself uses them unquantized. `chunk=1`
measures decoding.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import progress, weights
from research.nn.transformer import Transformer, init_cache
from research.typing import Array, Float, Int, Params, UserError

ROWS = 256
"""Number of positions whose logits are materialised at a time."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """The result of `perplexity`.

  Attributes:
    perplexity: `exp(nll)`.
    nll: mean negative log-likelihood per predicted token, in nats.
    tokens: number of predicted tokens.
    windows: number of windows.
    seconds: computing time without compilation.
  """

  perplexity: float
  nll: float
  tokens: int
  windows: int
  seconds: float


def log_probs(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B S"]:
  """Returns `log p(token | previous tokens)` of tokens 1 .. T-1, in fp32.

  Logits are computed for a few positions at a time, never as `[B, T, V]`.

  Args:
    tokens: the text of each row.
    lengths: lengths of the texts, if rows are right-padded.
  """
  known = tokens
  if lengths is not None:
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    known = jnp.where(inside, tokens, -1)
  params = weights.with_tokens(params, known)
  # Padding is no part of a text, by whose length `rope.Dynamic` rotates it.
  hidden, _ = model.apply({"params": params}, tokens, lengths=lengths)
  return _log_probs(model, params, hidden[:, :-1], tokens[:, 1:])


def _log_probs(
  model: Transformer,
  params: Params,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
  flat = hidden.reshape(-1, hidden.shape[-1])
  count = flat.shape[0]
  rows = min(ROWS, count)
  chunks = -(-count // rows)
  flat = jnp.pad(flat, ((0, chunks * rows - count), (0, 0)))
  flat_targets = jnp.pad(targets.reshape(-1), (0, chunks * rows - count))

  def chunk_log_probs(part):
    hidden, targets = part
    logits = model.apply({"params": params}, hidden, method="logits")
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  parts = flat.reshape(chunks, rows, -1), flat_targets.reshape(chunks, rows)
  return (
    jax.lax.map(chunk_log_probs, parts)
    .reshape(-1)[:count]
    .reshape(targets.shape)
  )


@functools.partial(jax.jit, static_argnames="model")
def _sums(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  first: Int[Array, ""],
) -> Float[Array, "B"]:
  """Returns the summed log-likelihood of each window, without padding."""
  each = log_probs(model, params, tokens, lengths)
  place = jnp.arange(1, tokens.shape[1])
  predicted = (place >= first) & (place < lengths[:, None])
  return jnp.sum(jnp.where(predicted, each, 0.0), axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "chunk", "kv"))
def _cached_sums(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  first: Int[Array, ""],
  chunk: int,
  kv: Any,
) -> Float[Array, "B"]:
  """Like `_sums`, with windows processed through a cache chunk by chunk."""
  rows, time = tokens.shape
  steps = -(-time // chunk)
  tokens = jnp.pad(tokens, ((0, 0), (0, steps * chunk + 1 - time)))
  cache = init_cache(model, params, rows, steps * chunk, kv=kv)
  # One program for all chunks: the first one also attends to the empty cache.
  cache = dataclasses.replace(cache, fresh=False)

  def step(cache, part):
    tokens, targets, start = part
    hidden, cache = model.apply({"params": params}, tokens, cache=cache)
    each = _log_probs(model, params, hidden, targets)
    place = start + jnp.arange(1, chunk + 1)
    predicted = (place >= first) & (place < lengths[:, None])
    return cache, jnp.sum(jnp.where(predicted, each, 0.0), axis=-1)

  inputs, targets = (
    x.reshape(rows, steps, chunk).swapaxes(0, 1)
    for x in (tokens[:, :-1], tokens[:, 1:])
  )
  starts = jnp.arange(steps) * chunk
  _, sums = jax.lax.scan(step, cache, (inputs, targets, starts))
  return jnp.sum(sums, axis=0)


def windows(
  ids: Sequence[int], window: int, max_windows: int | None = None
) -> list[Sequence[int]]:
  """Splits a text into windows.

  Args:
    ids: tokens of the whole text.
    window: tokens per window.
    max_windows: maximum number, from the start; None for all.

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
  chunk: int | None = None,
  kv: Any = None,
  begin: Sequence[int] = (),
) -> Perplexity:
  """Returns the perplexity of a text.

  Args:
    ids: tokens of the whole text.
    window: tokens per window; together with `begin`, at most the model's
      context.
    max_windows: maximum number of windows; None for all.
    batch: windows per batch.
    chunk: tokens processed at a time, through a cache; None processes whole
      windows without a cache.
    kv: quantizer of the cache, as for `init_cache`; requires `chunk`.
    begin: special tokens before each window.

  Raises:
    UserError: an argument is out of range, or the text has fewer than two
      tokens.
  """
  width = window + len(begin)
  if batch < 1:
    raise UserError(f"batch: found {batch}, expected at least 1")
  if chunk is not None and not 1 <= chunk <= width:
    raise UserError(f"chunk: found {chunk}, expected 1 to the window: {width}")
  if kv is not None and chunk is None:
    raise UserError("kv: found no chunk, expected one to read through a cache")
  if model.max_positions is not None and width > model.max_positions:
    special = f" and {len(begin)} special before them" if begin else ""
    raise UserError(
      f"window: found {window} tokens{special}, expected at most the model's "
      f"context of {model.max_positions}"
    )
  if len(ids) < 2:
    raise UserError(
      f"text: found {len(ids)} tokens, expected at least 2: the first one is "
      "given, and the others are predicted"
    )
  if window > len(ids):
    window, width = len(ids), len(ids) + len(begin)
  parts = windows(ids, window, max_windows)
  batch = min(batch, len(parts))
  rows = -(-len(parts) // batch) * batch
  tokens = np.zeros((rows, width), np.int32)
  lengths = np.zeros((rows,), np.int32)
  first = np.int32(len(begin) + 1)
  for i, part in enumerate([*begin, *part] for part in parts):
    tokens[i, : len(part)], lengths[i] = part, len(part)
  sums, options = _sums, {}
  if chunk is not None:
    sums, options = _cached_sums, {"chunk": chunk, "kv": kv}
  with progress.phase("compiling the model"):
    lowered = sums.lower(
      model, params, tokens[:batch], lengths[:batch], first, **options
    )
    compiled = lowered.compile()
  start = time.perf_counter()
  sums = []
  for i in progress.track(range(0, rows, batch), "reading windows"):
    part = slice(i, i + batch)
    sums.append(compiled(params, tokens[part], lengths[part], first))
    jax.block_until_ready(sums[-2:-1])  # at most two wait
  total = float(np.sum(np.asarray(jax.device_get(sums), np.float64)))
  seconds = time.perf_counter() - start
  count = int(np.sum(np.maximum(lengths - first, 0)))
  nll = -total / count
  # exp overflows for an untrained or broken model: return infinity.
  value = math.exp(nll) if nll < 700 else math.inf
  return Perplexity(value, nll, count, len(parts), seconds)
