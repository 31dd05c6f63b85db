"""Autoregressive generation: a compiled prefill, then compiled chunks.

A chunk of tokens is one program: it loops on the device, stops early when all
rows have ended, and the next chunk is dispatched before the last one is read,
so the host is never waited for. Prompts are padded on the right and the cache
is sized in buckets, so few shapes are ever compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import cpu_memory
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

TokenSource = Callable[..., Iterator[np.ndarray]]
"""What `chunks` is: tokens of rows as they come."""

CHUNK = 16
"""Tokens of one program, and between two looks at what was generated."""

_STOPS = 8
"""Stop tokens are padded to a multiple, so that their number is no shape."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What generation carries from token to token.

  Attributes:
    cache: keys and values of all tokens but the last.
    token: `[B]`, the last tokens, which the cache does not hold yet.
    step: how many tokens each row has, unless it has ended.
    done: `[B]`, which rows have ended.
    keys: `[B]`, one for each row.
    seen: `[B, V]`, tokens in prompt or text, or None where nobody asks.
  """

  cache: Any
  token: Any
  step: Any
  done: Any
  keys: Any
  seen: Any = None


def prepare(params: Params, model: Transformer) -> Params:
  """Returns `params` in the layout that decodes fastest; build it once.

  XLA's CPU backend reads fp32 weights faster as an array for each layer than
  as slices of a stacked one; with bf16, which it converts, the scan wins. On a
  CPU large ones become copies in huge pages (`cpu_memory`): drop the others.
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
  """Returns which rows end with a token.

  Args:
    token: of each row.
    step: how many tokens rows have with it, of all or of each.
    limit: how many each may have.
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
  seen: Bool[Array, "B V"] | None,
) -> tuple[Int[Array, "B"], Bool[Array, "B V"] | None]:
  """Returns the next tokens, and `seen` with them.

  Args:
    model: the Transformer.
    params: its parameters.
    hidden: of the last tokens.
    sampling, keys, step, seen: as for `sampling.choose`.
  """
  logits = model.apply({"params": params}, hidden, method="logits")
  token = samplers.sample(logits, sampling, keys, step, seen)
  if seen is not None:
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
  return token.astype(jnp.int32), seen


@functools.partial(jax.jit, static_argnames=("model", "capacity", "kv"))
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
) -> tuple[State, Int[Array, "B 1"], Bool[Array, "B"]]:
  """Returns the state after the prompts, the first tokens, and who ended.

  Args:
    model: the Transformer.
    params: its parameters.
    tokens: prompts, padded on the right.
    lengths: of the prompts.
    sampling: how tokens are chosen.
    key: of the whole call.
    examples: each row's index, which its own key is derived from.
    limit: how many tokens each row may generate.
    stop: tokens that end a row.
    capacity: of the cache.
    kv: how it is packed, as for `init_cache`.
  """
  rows, time = tokens.shape
  cache = init_cache(model, params, rows, capacity, kv=kv)
  last, cache = model.apply(
    {"params": params},
    tokens,
    cache=cache,
    lengths=lengths,
    keep=lengths[:, None] - 1,
  )
  last = last[:, 0]
  seen = None
  if sampling.repetition_penalty is not None:
    inside = jnp.arange(time) < lengths[:, None]
    ids = jnp.where(inside, tokens, model.vocab_size)
    seen = jnp.zeros((rows, model.vocab_size), bool)
    seen = seen.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")
  keys = samplers.row_keys(key, examples)
  token, seen = sample_next(model, params, last, sampling, keys, 0, seen)
  done = has_ended(token, 1, limit, stop)
  state = State(cache, token, jnp.int32(1), done, keys, seen)
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
  """Returns the state `size` tokens on, those tokens, and which rows ended.

  Rows that have ended get `NONE`; the loop ends with the last of them.

  Args:
    model: the Transformer.
    params: its parameters.
    state: from `prefill` or `decode`; its memory is used again.
    sampling: how tokens are chosen.
    limit: how many tokens each row may generate.
    stop: tokens that end a row.
    size: how many tokens.
  """

  def unfinished(carry):
    i, state, _ = carry
    return (i < size) & ~jnp.all(state.done)

  def step(carry):
    i, state, out = carry
    hidden, cache = model.apply(
      {"params": params}, state.token[:, None], cache=state.cache
    )
    token, seen = sample_next(
      model,
      params,
      hidden[:, 0],
      sampling,
      state.keys,
      state.step,
      state.seen,
    )
    shown = jnp.where(state.done, NO_TOKEN, token)
    out = jax.lax.dynamic_update_slice_in_dim(out, shown[:, None], i, axis=1)
    done = state.done | has_ended(token, state.step + 1, limit, stop)
    return (
      i + 1,
      State(cache, token, state.step + 1, done, state.keys, seen),
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
) -> Iterator[np.ndarray]:
  """Yields new tokens `[B, n]` as they come, `NONE` after a row's end.

  Args:
    model: the Transformer.
    params: its parameters, best from `prepare`.
    prompts: token ids, at least one each.
    max_new_tokens: for each prompt; fewer where its context is full.
    sampling: how tokens are chosen.
    key: of the sampling; seed 0 by default.
    stop_tokens: end a row, and are the last that it yields.
    examples: index of each prompt; its sample depends on the key and on this,
      not on the batch. By default 0, 1, ...
    size: tokens between two looks.
    kv: how the cache is packed, as for `init_cache`.

  Raises:
    UserError: a prompt is empty, too long, or no prompt for this model.
  """
  samplers.check(sampling)
  room = token_limits(model, prompts, max_new_tokens)
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
  """Returns where tokens come from: `chunks`, or what stands in its place.

  Args:
    kv: how the cache of `chunks` is packed.
    source: called as `chunks` is, without `kv`; or None.

  Raises:
    UserError: both are given.
  """
  if source is None:
    return functools.partial(chunks, kv=kv)
  if kv is not None:
    raise UserError(
      f"kv: found {kv!r} beside a source, expected one of them: a source packs "
      "its own cache"
    )
  return source


def pad_stop_tokens(tokens: Sequence[int]) -> np.ndarray:
  """Returns tokens that end a row, padded: their number is no shape."""
  found = sorted(set(tokens))
  found += [NO_TOKEN] * (-len(found) % _STOPS or (0 if found else _STOPS))
  return np.array(found, np.int32)


def token_limits(
  model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
  """Returns how many tokens each prompt may be continued by.

  Args:
    model, prompts, max_new_tokens: as for `chunks`.

  Raises:
    UserError: a prompt is empty, too long, or no prompt for this model.
  """
  if max_new_tokens < 1:
    raise UserError(
      f"max_new_tokens: found {max_new_tokens}, expected at least 1"
    )
  if not prompts:
    raise UserError("prompts: found none, expected at least one")
  found = []
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(
        f"prompt {i}: found no tokens, expected at least one to continue"
      )
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
      raise UserError(
        f"prompt {i}: found token {max(prompt)}, expected ids below "
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
  """Returns continuations of token prompts.

  Args:
    model, params, prompts, max_new_tokens, sampling, key, stop_tokens,
      examples, kv: as for `chunks`.
    source: see `source_of`.
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
