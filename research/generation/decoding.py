"""Decoding as rows with a state: prefill, decode, pause, branch.

Every row of a batch has its own number of tokens, limit, random key and end.
Rows that have ended, or that pause where a step of their text ends
(`boundary`), compute nothing that is read and write nothing to their cache, so
a row that pauses and goes on has the tokens of one that never paused. `select`
duplicates and drops rows between two calls. All functions are pure.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.generation import sampling as samplers
from research.generation.boundary import Boundary, StepState
from research.generation.generated import NO_TOKEN
from research.generation.sampling import Sampling
from research.nn.cache import Cache, put_rows, take_rows
from research.nn.transformer import Transformer, init_cache
from research.typing import Array, Bool, Float, Int, Params, PRNGKey

PromptMask = Callable[[Array, Array], Mask | None]
"""`mask(tokens [B, T], lengths [B])` of right-padded prompts; None is causal.
Each object compiles its own program, unless it compares equal."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a batch between tokens, besides their keys and values.

  Attributes:
    token: `[B]`, the last token, not yet in the cache.
    step: `[B]`, number of generated tokens.
    limit: `[B]`, maximum number of generated tokens.
    done: `[B]`, whether the row has ended.
    keys: `[B]`, random keys.
    occurred: `[B, V]`, whether each token occurs in the prompt or the generated
      text, without the last token, which may be replaced; None without a
      repetition penalty.
    steps: where the row is within a step of its text; None where no row pauses.
  """

  token: Any
  step: Any
  limit: Any
  done: Any
  keys: Any
  occurred: Any = None
  steps: StepState | None = None

  @property
  def active(self) -> Bool[Array, "B"]:
    """Which rows get a token next."""
    return ~self.done if self.steps is None else ~self.done & ~self.steps.paused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The state of decoding between tokens.

  Attributes:
    cache: keys and values of all tokens but the last.
    rows: everything else.
  """

  cache: Cache
  rows: Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
  """New tokens of all rows.

  Attributes:
    tokens: `[B, C]`, `NO_TOKEN` where a row got none.
    done: `[B]`, which rows have ended.
    log_probs: float32 `[B, C]`, log p of each token under the model, before
      temperature and the other rules; 0 where there is no token. None if they
      were not asked for.
  """

  tokens: Any
  done: Any
  log_probs: Any = None


def has_ended(
  token: Int[Array, "B"],
  step: Int[Array, "B"],
  limit: Int[Array, "B"],
  stop: Int[Array, "E"],
) -> Bool[Array, "B"]:
  """Returns whether each row ends with its newest token.

  Args:
    token: newest token of each row.
    step: number of generated tokens including it.
    limit: maximum number of generated tokens of each row.
    stop: tokens that end a row.
  """
  return jnp.any(token[:, None] == stop, axis=-1) | (step >= limit)


def next_token(
  model: Transformer,
  params: Params,
  rows: Rows,
  hidden: Float[Array, "B D"],
  sampling: Sampling,
  stop: Int[Array, "E"],
  boundary: Boundary | None = None,
  log_probs: bool = False,
) -> tuple[Rows, Int[Array, "B"], Float[Array, "B"] | None]:
  """Draws a token for each active row.

  A placeholder of images (`weights.extra_ids`) is never sampled: it would stand
  for a feature, not for a word.

  Args:
    rows: rows before the token.
    hidden: hidden states of their last tokens.
    stop: tokens that end a row.
    boundary: where rows pause; None for nowhere.

  Returns:
    The rows with it; the tokens, `NO_TOKEN` for rows that are not active; and
    log p of each under the model, or None.
  """
  active, occurred = rows.active, _occurred(rows, rows.active)
  logits = model.apply({"params": params}, hidden, method="logits")
  logits = samplers.exclude(logits, weights.extra_ids(params))
  drawn = samplers.sample(
    logits, sampling, rows.keys, rows.step, occurred
  ).astype(jnp.int32)
  scores = None
  if log_probs:
    logit = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
    scores = logit.astype(jnp.float32) - jax.nn.logsumexp(logits, axis=-1)
    scores = jnp.where(active, scores, 0.0)
  step = rows.step + active
  done = rows.done | (active & has_ended(drawn, step, rows.limit, stop))
  steps = rows.steps
  if boundary is not None:
    steps = boundary.after_token(steps, drawn, active & ~done)
  token = jnp.where(active, drawn, rows.token)
  rows = Rows(token, step, rows.limit, done, rows.keys, occurred, steps)
  return rows, jnp.where(active, drawn, NO_TOKEN), scores


def _occurred(rows: Rows, which: Bool[Array, "B"]) -> Any:
  """Returns `rows.occurred`, with the last generated token of some rows."""
  if rows.occurred is None:
    return None
  has_token = which & (rows.step > 0)
  place = jnp.where(has_token, rows.token, rows.occurred.shape[1])
  lines = jnp.arange(len(place))
  return rows.occurred.at[lines, place].set(True, mode="drop")


@functools.partial(
  jax.jit, static_argnames=("model", "capacity", "kv", "mask", "log_probs")
)
def prefill(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  sampling: Sampling,
  key: PRNGKey,
  examples: Int[Array, " N"],
  limit: Int[Array, " N"],
  stop: Int[Array, "E"],
  capacity: int,
  kv: Any = None,
  mask: PromptMask | None = None,
  boundary: Boundary | None = None,
  log_probs: bool = False,
) -> tuple[State, GeneratedTokens]:
  """Processes the prompts and samples the first token of each row.

  With more rows than prompts, each prompt is processed once and then copied:
  of 3 prompts and 6 rows, rows 0 and 1 continue the first one.

  Args:
    tokens: prompts, right-padded.
    key: random key of the whole call.
    examples: index of each row, from which its own key is derived; N is a
      multiple of B.
    limit: maximum number of new tokens of each row.
    stop: tokens that end a row.
    capacity: number of positions in the cache.
    kv: quantizer of the cache, as for `init_cache`.
    mask: what the tokens of a prompt see of each other; None for causal.
    boundary: where rows pause; None for nowhere.
    log_probs: whether to return the log-probabilities of the tokens.

  Returns:
    The state of N rows, and their first tokens `[N, 1]`.
  """
  count, time = tokens.shape
  cache = init_cache(model, params, count, capacity, kv=kv)
  last, cache = model.apply(
    {"params": params},
    tokens,
    mask=None if mask is None else mask(tokens, lengths),
    cache=cache,
    lengths=lengths,
    keep=lengths[:, None] - 1,
  )
  occurred = None
  if sampling.repetition_penalty is not None:
    inside = jnp.arange(time) < lengths[:, None]
    ids = jnp.where(inside, tokens, model.vocab_size)
    occurred = jnp.zeros((count, model.vocab_size), bool)
    occurred = occurred.at[jnp.arange(count)[:, None], ids].set(
      True, mode="drop"
    )
  last = last[:, 0]
  copies, total = examples.shape[0] // count, examples.shape[0]
  if copies > 1:
    of = jnp.repeat(jnp.arange(count), copies)
    cache, last = take_rows(cache, of), last[of]
    occurred = None if occurred is None else occurred[of]
  none = jnp.zeros(total, jnp.int32)
  rows = Rows(
    token=none,
    step=none,
    limit=limit,
    done=jnp.zeros(total, bool),
    keys=samplers.row_keys(key, examples),
    occurred=occurred,
    steps=None if boundary is None else boundary.start(total),
  )
  rows, token, scores = next_token(
    model, params, rows, last, sampling, stop, boundary, log_probs
  )
  scores = None if scores is None else scores[:, None]
  return State(cache, rows), GeneratedTokens(token[:, None], rows.done, scores)


@functools.partial(
  jax.jit,
  static_argnames=("model", "size", "log_probs"),
  donate_argnames=("state",),
)
def decode(
  model: Transformer,
  params: Params,
  state: State,
  sampling: Sampling,
  stop: Int[Array, "E"],
  size: int,
  boundary: Boundary | None = None,
  log_probs: bool = False,
) -> tuple[State, GeneratedTokens]:
  """Decodes up to `size` tokens; stops early when no row is active.

  Args:
    state: from `prefill`, `decode` or `select`; its buffers are donated.
    stop: tokens that end a row.
    size: C, number of tokens.
    boundary, log_probs: as for `prefill`.

  Returns:
    The new state, and the new tokens `[B, C]`.
  """

  count = state.rows.token.shape[0]
  tokens = jnp.full((count, size), NO_TOKEN, jnp.int32)
  scores = jnp.zeros((count, size), jnp.float32)
  out = (tokens, scores) if log_probs else (tokens,)

  def step(carry):
    i, state, out = carry
    hidden, cache = model.apply(
      {"params": params},
      state.rows.token[:, None],
      cache=state.cache,
      lengths=state.rows.active.astype(jnp.int32),
    )
    rows, *drawn = next_token(
      *(model, params, state.rows, hidden[:, 0], sampling, stop),
      *(boundary, log_probs),
    )
    out = tuple(
      jax.lax.dynamic_update_slice_in_dim(old, new[:, None], i, axis=1)
      for old, new in zip(out, drawn[: len(out)], strict=True)
    )
    return i + 1, State(cache, rows), out

  def unfinished(carry):
    i, state, _ = carry
    return (i < size) & jnp.any(state.rows.active)

  _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
  return state, GeneratedTokens(out[0], state.rows.done, *out[1:])


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("state",)
)
def append(
  model: Transformer,
  params: Params,
  state: State,
  tokens: Int[Array, "B C"],
  replace: Bool[Array, "B"],
) -> State:
  """Returns the state after tokens that were not drawn.

  A row that gets some is open again, unless it is at its limit, and begins a
  step of its text.

  Args:
    state: any state; its buffers are donated.
    tokens: new tokens for each row, with `NO_TOKEN` behind the last one. With
      those that it has, no row may have more than its limit.
    replace: which rows lose their last token first, such as one that ended
      them too early.
  """
  rows, count = state.rows, jnp.sum(tokens != NO_TOKEN, axis=1)
  some = count > 0
  replace = replace & some
  # The last token is not in the cache yet: it is fed with the new ones, all but
  # the last of which are; one that is replaced never is.
  fed = jnp.concatenate([rows.token[:, None], tokens], axis=1)
  fed = jnp.where(replace[:, None], jnp.roll(fed, -1, axis=1), fed)[:, :-1]
  _, cache = model.apply(
    {"params": params},
    jnp.maximum(fed, 0),
    cache=state.cache,
    lengths=count - replace,
  )
  place = jnp.maximum(count - 1, 0)[:, None]
  last = jnp.take_along_axis(tokens, place, axis=1)[:, 0]
  occurred = _occurred(rows, some & ~replace)
  if occurred is not None:
    before = jnp.arange(tokens.shape[1]) < count[:, None] - 1
    every = jnp.where(before, tokens, occurred.shape[1])
    lines = jnp.arange(len(count))[:, None]
    occurred = occurred.at[lines, every].set(True, mode="drop")
  step = rows.step + count - replace
  new = Rows(
    token=jnp.where(some, last, rows.token),
    step=step,
    limit=rows.limit,
    done=jnp.where(some, step >= rows.limit, rows.done),
    keys=rows.keys,
    occurred=occurred,
    steps=None if rows.steps is None else rows.steps.restarted(some),
  )
  return State(cache, new)


def resume(rows: Rows) -> Rows:
  """Returns the rows with none paused."""
  return dataclasses.replace(rows, steps=rows.steps.resumed())


@jax.jit
def select(
  state: State, rows: Int[Array, " N"], branch: Int[Array, " N"]
) -> State:
  """Returns the state of N rows, each of which goes on from one of `state`.

  Args:
    state: any.
    rows: the row from which each goes on. One that is named twice is
      duplicated, one that is not named is dropped.
    branch: which continuation of that row each is: 0 draws what the row would
      have drawn; others have random keys of their own.
  """
  return State(
    take_rows(state.cache, rows), select_rows(state.rows, rows, branch)
  )


@functools.partial(jax.jit, donate_argnames=("state",))
def store(state: State, new: State, rows: Int[Array, " N"]) -> State:
  """Returns the state with N of its rows replaced by those of `new`.

  Args:
    state: any; its buffers are donated.
    new: N rows of the same capacity.
    rows: where each goes; the number of rows of `state`, or more: nowhere.
  """

  def put(old, x):
    return old.at[rows].set(x, mode="drop")

  return State(
    put_rows(state.cache, new.cache, rows),
    jax.tree.map(put, state.rows, new.rows),
  )


def select_rows(
  rows: Rows, chosen: Int[Array, " N"], branch: Int[Array, " N"]
) -> Rows:
  """Returns N rows without their keys and values; arguments as for `select`."""
  rows = jax.tree.map(lambda x: x[chosen], rows)
  keys = branch_keys(rows.keys, rows.step, branch)
  return dataclasses.replace(rows, keys=keys)


def branch_keys(
  keys: PRNGKey, step: Int[Array, " N"], branch: Int[Array, " N"]
) -> PRNGKey:
  """Returns the random keys of continuations of rows; branch 0 has the row's.

  Args:
    keys: random keys of the rows, `[N]`.
    step: numbers that sampling has folded into them so far, from 0 up.
    branch: number of each continuation of its row.
  """

  def fork(key, step, branch):
    # These count down from 2^32 - 1, so no token is drawn with the key of a
    # branch.
    other = jax.random.fold_in(jax.random.fold_in(key, ~step), branch)
    return jnp.where(branch == 0, key, other)

  return jax.vmap(fork)(keys, step.astype(jnp.uint32), branch)
