"""Autoregressive generation: a jitted prefill, then jitted chunks of decoding.

A chunk of tokens is one program. It loops on the device and stops early when
all rows have ended. The next chunk is dispatched before the previous one is
read, so the device never waits for the host. Prompts are right-padded and cache
sizes are rounded to buckets, so few shapes are compiled.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import cpu_memory
from research import tree, weights
from research.generation import decoding
from research.generation import sampling as samplers
from research.generation.decoding import PromptMask
from research.generation.generated import (
  NO_TOKEN,
  Generated,
  collect,
  drop_empty_columns,
)
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer
from research.rounding import next_power_of_two
from research.typing import Int, Params, PRNGKey, UserError

TokenSource = Callable[..., Iterator[np.ndarray]]
"""A function with the signature of `chunks`, which yields new tokens."""

CHUNK = 16
"""Tokens per decoding program, and per chunk that is yielded."""

_STOPS = 8
"""Stop tokens are padded to a multiple of this, to avoid recompilation."""


def prepare(params: Params, model: Transformer) -> Params:
  """Returns `params` in the layout that decodes fastest; call it once.

  On a CPU, large arrays are copied to huge pages (`cpu_memory`): drop the
  originals to free their memory.
  """
  if jax.default_backend() != "cpu":
    return params
  return cpu_memory.in_huge_pages(by_layer(params, model))


def by_layer(params: Params, model: Transformer) -> Params:
  """Returns `params` with an array for each layer where that decodes faster.

  XLA's CPU backend reads fp32 weights faster so than as slices of a stacked
  array. With bf16, which it converts, the scan is faster.
  """
  on_cpu = jax.default_backend() == "cpu"
  return tree.unroll(params) if on_cpu and model.dtype == "float32" else params


def bucket(n: int) -> int:
  """Returns `n` rounded up by at most an eighth, or to a multiple of 16."""
  step = max(16, next_power_of_two(n) // 16)
  return -(-n // step) * step


def chunks(
  model: Transformer,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: PRNGKey | None = None,
  stop_tokens: Sequence[int] = (),
  examples: Sequence[int] | None = None,
  size: int = CHUNK,
  kv: Any = None,
  mask: PromptMask | None = None,
  copies: int = 1,
  room: int = 1,
) -> Iterator[np.ndarray]:
  """Yields chunks of new tokens `[B, n]`, with `NO_TOKEN` after a row's end.

  Args:
    params: its parameters, preferably from `prepare`.
    prompts: token ids, at least one each.
    max_new_tokens: maximum per prompt; fewer if the context is full earlier.
    key: random key of the sampling; seed 0 by default.
    stop_tokens: end a row, and are yielded as its last token.
    examples: index of each row; its sample depends on the key and on this
      index, not on the batch. By default 0, 1, ...
    size: tokens per chunk.
    kv: quantizer of the cache, as for `init_cache`.
    mask: what the tokens of a prompt see of each other; None for causal. Bind
      it by `functools.partial` to get a `TokenSource`.
    copies: rows that continue each prompt, one after the other; the prompt is
      processed once.
    room: prompt tokens that there is room for at least: calls whose prompts are
      no longer share their programs.

  Raises:
    UserError: a prompt is empty, too long, or has ids outside the vocabulary.
  """
  samplers.check(sampling)
  extra = weights.extra_ids(params)
  limits = token_limits(model, prompts, max_new_tokens, extra)
  tokens, lengths = pad_prompts(prompts, room)
  asked = bind_prompts(params, tokens, lengths)
  params = bind_prompts(
    params, *(x.repeat(copies, 0) for x in (tokens, lengths))
  )
  limit = np.array(limits, np.int32).repeat(copies)
  stop = pad_stop_tokens(stop_tokens)
  rows = range(len(limit)) if examples is None else examples
  steps = max(limits)
  state, drawn = decoding.prefill(
    model,
    asked,
    tokens,
    lengths,
    sampling,
    jax.random.key(0) if key is None else key,
    np.array(rows, np.int32),
    limit,
    stop,
    capacity=bucket(max(room, *map(len, prompts)) + steps),
    kv=kv,
    mask=mask,
  )
  dispatched = 1
  while True:
    ahead = None
    if dispatched < steps:
      ahead = decoding.decode(model, params, state, sampling, stop, size)
      dispatched += size
    ended = np.all(np.asarray(drawn.done))
    yield drop_empty_columns(np.asarray(drawn.tokens))
    if ended or ahead is None:
      return
    state, drawn = ahead


def token_source(kv: Any, source: TokenSource | None) -> TokenSource:
  """Returns the function that generates tokens: `source`, or else `chunks`.

  Args:
    kv: quantizer of the cache of `chunks`.
    source: called like `chunks`, without `kv`; or None.

  Raises:
    UserError: both are given.
  """
  if source is None:
    return functools.partial(chunks, kv=kv)
  if kv is not None:
    raise UserError(
      f"kv: found {kv!r} together with a source, expected one of them: a "
      "source has its own cache"
    )
  return source


def pad_prompts(
  prompts: Sequence[Sequence[int]], room: int = 1
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
  """Returns token ids padded on the right to a bucket, and their numbers.

  Args:
    prompts: token ids.
    room: tokens that there is room for at least, so that batches of shorter and
      longer prompts have one shape.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros(
    (len(prompts), bucket(max(int(lengths.max()), room))), np.int32
  )
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  return tokens, lengths


def bind_prompts(
  params: Params,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, " B"],
) -> Params:
  """Returns weights that know the tokens of their rows (`weights.with_tokens`).

  Args:
    tokens, lengths: from `pad_prompts`.
  """
  inside = np.arange(tokens.shape[1]) < lengths[:, None]
  return weights.with_tokens(params, jnp.where(inside, tokens, NO_TOKEN))


def pad_stop_tokens(tokens: Sequence[int]) -> np.ndarray:
  """Returns the stop tokens, padded with `NO_TOKEN` to a common length."""
  padded = sorted(set(tokens))
  padded += [NO_TOKEN] * (-len(padded) % _STOPS or (0 if padded else _STOPS))
  return np.array(padded, np.int32)


def token_limits(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  extra: Sequence[int] = (),
) -> list[int]:
  """Returns the maximum number of new tokens of each prompt.

  Args:
    model, prompts, max_new_tokens: as for `chunks`.
    extra: ids outside of the vocabulary that prompts may have
      (`weights.extra_ids`).

  Raises:
    UserError: a prompt is empty, too long, or has ids outside the vocabulary.
  """
  if max_new_tokens < 1:
    raise UserError(
      f"max_new_tokens: found {max_new_tokens}, expected at least 1"
    )
  if not prompts:
    raise UserError("prompts: found none, expected at least one")
  limits, vocab = [], model.input_vocab or model.vocab_size
  for i, prompt in enumerate(prompts, 1):
    if not len(prompt):
      raise UserError(
        f"prompt {i}: found no tokens, expected at least one to continue"
      )
    unknown = [
      token for token in prompt if not 0 <= token < vocab and token not in extra
    ]
    if unknown:
      raise UserError(
        f"prompt {i}: found token {max(unknown)}, expected ids below "
        f"{vocab}: is this the model's own tokenizer?"
      )
    room = max_new_tokens
    if model.max_positions is not None:
      room = model.max_positions - len(prompt)
    if room < 1:
      raise UserError(
        f"prompt {i}: found {len(prompt)} tokens, expected fewer than the "
        f"model's context of {model.max_positions}: shorten it"
      )
    limits.append(min(max_new_tokens, room))
  return limits


def generate(
  model: Transformer,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: PRNGKey | None = None,
  stop_tokens: Sequence[int] = (),
  examples: Sequence[int] | None = None,
  kv: Any = None,
  source: TokenSource | None = None,
) -> Generated:
  """Generates continuations of token prompts.

  Args:
    model, params, prompts, max_new_tokens, sampling, key, stop_tokens,
      examples, kv: as for `chunks`.
    source: see `token_source`.
  """
  parts = token_source(kv, source)(
    model,
    params,
    prompts,
    max_new_tokens,
    sampling,
    key,
    stop_tokens,
    examples,
  )
  return collect(parts, stop_tokens)
