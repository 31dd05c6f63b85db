"""Autoregressive generation: a jitted prefill, then jitted chunks of decoding.

A chunk of tokens is one program. It loops on the device and stops early when
all rows have ended. The next chunk is dispatched before the previous one is
read, so the device never waits for the host. Prompts are right-padded and cache
sizes are rounded to buckets, so few shapes are compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import cpu_memory
from kernels_pallas.masks import Mask
from research import tree, weights
from research.generation import sampling as samplers
from research.generation.generated import (
  NO_TOKEN,
  Generated,
  collect,
  drop_empty_columns,
)
from research.generation.sampling import GREEDY, Sampling
from research.nn.transformer import Transformer, init_cache
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError

PromptMask = Callable[[Array, Array], Mask | None]
"""`mask(tokens [B, T], lengths [B])` of right-padded prompts; None is causal.
Each object compiles its own program, unless it compares equal."""

TokenSource = Callable[..., Iterator[np.ndarray]]
"""A function with the signature of `chunks`, which yields new tokens."""

CHUNK = 16
"""Tokens per decoding program, and per chunk that is yielded."""

_STOPS = 8
"""Stop tokens are padded to a multiple of this, to avoid recompilation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The state of decoding between tokens.

  Attributes:
    cache: keys and values of all tokens but the last.
    token: `[B]`, the last token of each row, not yet in the cache.
    step: number of tokens generated so far by rows that have not ended.
    done: `[B]`, whether each row has ended.
    keys: `[B]`, random key of each row.
    occurred: `[B, V]`, whether each token occurs in the prompt or the generated
      text; None without a repetition penalty.
  """

  cache: Any
  token: Any
  step: Any
  done: Any
  keys: Any
  occurred: Any = None


def prepare(params: Params, model: Transformer) -> Params:
  """Returns `params` in the layout that decodes fastest; call it once.

  XLA's CPU backend reads fp32 weights faster as one array per layer than as
  slices of a stacked array. With bf16, which it converts, the scan is faster.
  On a CPU, large arrays are copied to huge pages (`cpu_memory`): drop the
  originals to free their memory.
  """
  if jax.default_backend() != "cpu":
    return params
  if model.dtype == "float32":
    params = tree.unroll(params)
  return cpu_memory.in_huge_pages(params)


def bucket(n: int) -> int:
  """Returns `n` rounded up by at most an eighth, or to a multiple of 16."""
  step = max(16, 1 << max((n - 1).bit_length() - 4, 0))
  return -(-n // step) * step


def has_ended(
  token: Int[Array, "B"],
  step: Any,
  limit: Int[Array, "B"],
  stop: Int[Array, "E"],
) -> Bool[Array, "B"]:
  """Returns whether each row ends with its newest token.

  Args:
    token: newest token of each row.
    step: number of generated tokens including it, shared or per row.
    limit: maximum number of generated tokens of each row.
    stop: tokens that end a row.
  """
  return jnp.any(token[:, None] == stop, axis=-1) | (step >= limit)


def sample_next(
  model: Transformer,
  params: Params,
  hidden: Float[Array, "B D"],
  sampling: Sampling,
  keys: PRNGKey,
  step: Any,
  occurred: Bool[Array, "B V"] | None,
) -> tuple[Int[Array, "B"], Bool[Array, "B V"] | None]:
  """Samples the next token of each row; returns it and the updated `occurred`.

  A placeholder of images (`weights.extra_ids`) is never sampled: it would stand
  for a feature, not for a word.

  Args:
    model: the Transformer.
    params: its parameters.
    hidden: hidden states of the last tokens.
    sampling, keys, step, occurred: as for `sampling.sample`.
  """
  logits = model.apply({"params": params}, hidden, method="logits")
  for token in weights.extra_ids(params["embed"]):
    if token < logits.shape[-1]:
      logits = logits.at[..., token].set(-jnp.inf)
  token = samplers.sample(logits, sampling, keys, step, occurred)
  if occurred is not None:
    occurred = occurred.at[jnp.arange(token.shape[0]), token].set(True)
  return token.astype(jnp.int32), occurred


@functools.partial(jax.jit, static_argnames=("model", "capacity", "kv", "mask"))
def prefill(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  sampling: Sampling,
  key: PRNGKey,
  examples: Int[Array, "B"],
  limit: Int[Array, "B"],
  stop: Int[Array, "E"],
  capacity: int,
  kv: Any = None,
  mask: PromptMask | None = None,
) -> tuple[State, Int[Array, "B 1"], Bool[Array, "B"]]:
  """Processes the prompts and samples the first token of each row.

  Args:
    model: the Transformer.
    params: its parameters.
    tokens: prompts, right-padded.
    lengths: lengths of the prompts.
    sampling: sampling parameters.
    key: random key of the whole call.
    examples: index of each row, from which its own key is derived.
    limit: maximum number of new tokens of each row.
    stop: tokens that end a row.
    capacity: number of positions in the cache.
    kv: quantizer of the cache, as for `init_cache`.
    mask: what the tokens of a prompt see of each other; None for causal.

  Returns:
    The decoding state, the first tokens, and whether each row has ended.
  """
  rows, time = tokens.shape
  cache = init_cache(model, params, rows, capacity, kv=kv)
  last, cache = model.apply(
    {"params": params},
    tokens,
    mask=None if mask is None else mask(tokens, lengths),
    cache=cache,
    lengths=lengths,
    keep=lengths[:, None] - 1,
  )
  last = last[:, 0]
  occurred = None
  if sampling.repetition_penalty is not None:
    inside = jnp.arange(time) < lengths[:, None]
    ids = jnp.where(inside, tokens, model.vocab_size)
    occurred = jnp.zeros((rows, model.vocab_size), bool)
    occurred = occurred.at[jnp.arange(rows)[:, None], ids].set(
      True, mode="drop"
    )
  keys = samplers.row_keys(key, examples)
  token, occurred = sample_next(
    model, params, last, sampling, keys, 0, occurred
  )
  done = has_ended(token, 1, limit, stop)
  state = State(cache, token, jnp.int32(1), done, keys, occurred)
  return state, token[:, None], done


@functools.partial(
  jax.jit, static_argnames=("model", "size"), donate_argnames=("state",)
)
def decode(
  model: Transformer,
  params: Params,
  state: State,
  sampling: Sampling,
  limit: Int[Array, "B"],
  stop: Int[Array, "E"],
  size: int,
) -> tuple[State, Int[Array, "B C"], Bool[Array, "B"]]:
  """Decodes up to `size` tokens; stops early when all rows have ended.

  Args:
    model: the Transformer.
    params: its parameters.
    state: from `prefill` or `decode`; its buffers are donated.
    sampling: sampling parameters.
    limit: maximum number of new tokens of each row.
    stop: tokens that end a row.
    size: number of tokens.

  Returns:
    The new state, the new tokens (`NO_TOKEN` after a row's end), and whether
    each row has ended.
  """

  def unfinished(carry):
    i, state, _ = carry
    return (i < size) & ~jnp.all(state.done)

  def step(carry):
    i, state, out = carry
    hidden, cache = model.apply(
      {"params": params}, state.token[:, None], cache=state.cache
    )
    token, occurred = sample_next(
      model,
      params,
      hidden[:, 0],
      sampling,
      state.keys,
      state.step,
      state.occurred,
    )
    shown = jnp.where(state.done, NO_TOKEN, token)
    out = jax.lax.dynamic_update_slice_in_dim(out, shown[:, None], i, axis=1)
    done = state.done | has_ended(token, state.step + 1, limit, stop)
    return (
      i + 1,
      State(cache, token, state.step + 1, done, state.keys, occurred),
      out,
    )

  out = jnp.full((state.token.shape[0], size), NO_TOKEN, jnp.int32)
  _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
  return state, out, state.done


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
) -> Iterator[np.ndarray]:
  """Yields chunks of new tokens `[B, n]`, with `NO_TOKEN` after a row's end.

  Args:
    model: the Transformer.
    params: its parameters, preferably from `prepare`.
    prompts: token ids, at least one each.
    max_new_tokens: maximum per prompt; fewer if the context is full earlier.
    sampling: sampling parameters.
    key: random key of the sampling; seed 0 by default.
    stop_tokens: end a row, and are yielded as its last token.
    examples: index of each prompt; its sample depends on the key and on this
      index, not on the batch. By default 0, 1, ...
    size: tokens per chunk.
    kv: quantizer of the cache, as for `init_cache`.
    mask: what the tokens of a prompt see of each other; None for causal. Bind
      it by `functools.partial` to get a `TokenSource`.

  Raises:
    UserError: a prompt is empty, too long, or has ids outside the vocabulary.
  """
  samplers.check(sampling)
  extra = weights.extra_ids(params["embed"])
  room = token_limits(model, prompts, max_new_tokens, extra)
  longest = max(map(len, prompts))
  tokens = np.zeros((len(prompts), bucket(longest)), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  inside = np.arange(tokens.shape[1]) < np.array([[len(p)] for p in prompts])
  params = weights.with_tokens(params, jnp.where(inside, tokens, NO_TOKEN))
  limit, stop = np.array(room, np.int32), pad_stop_tokens(stop_tokens)
  rows = range(len(prompts)) if examples is None else examples
  steps = max(room)
  state, shown, done = prefill(
    model,
    params,
    tokens,
    np.array([len(p) for p in prompts], np.int32),
    sampling,
    jax.random.key(0) if key is None else key,
    np.array(rows, np.int32),
    limit,
    stop,
    capacity=bucket(longest + steps),
    kv=kv,
    mask=mask,
  )
  made = 1
  while True:
    ahead = None
    if made < steps:
      ahead = decode(model, params, state, sampling, limit, stop, size)
      made += size
    ended = np.all(np.asarray(done))
    yield drop_empty_columns(np.asarray(shown))
    if ended or ahead is None:
      return
    state, shown, done = ahead


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


def pad_stop_tokens(tokens: Sequence[int]) -> np.ndarray:
  """Returns the stop tokens, padded with `NO_TOKEN` to a common length."""
  found = sorted(set(tokens))
  found += [NO_TOKEN] * (-len(found) % _STOPS or (0 if found else _STOPS))
  return np.array(found, np.int32)


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
  found = []
  for i, prompt in enumerate(prompts, 1):
    if not len(prompt):
      raise UserError(
        f"prompt {i}: found no tokens, expected at least one to continue"
      )
    unknown = [
      token
      for token in prompt
      if not 0 <= token < model.vocab_size and token not in extra
    ]
    if unknown:
      raise UserError(
        f"prompt {i}: found token {max(unknown)}, expected ids below "
        f"{model.vocab_size}: is this the model's own tokenizer?"
      )
    room = max_new_tokens
    if model.max_positions is not None:
      room = model.max_positions - len(prompt)
    if room < 1:
      raise UserError(
        f"prompt {i}: found {len(prompt)} tokens, expected fewer than the "
        f"model's context of {model.max_positions}: shorten it"
      )
    found.append(min(max_new_tokens, room))
  return found


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
