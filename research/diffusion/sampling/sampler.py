"""Text from a masked diffusion model: one loop, whatever the policy.

A row is a prompt and `length` masks. Its blocks are filled from left to right;
in a block, each step asks the denoiser for logits, makes a candidate for every
place, and keeps those that the policy chooses (Nie et al. 2025,
arXiv:2502.09992, algorithm 5, as its code has it). A block is one compiled
program whose start is data; so all blocks, and all prompts of a shape, share
it. What is random in a row depends on the row's own key and steps alone, so its
tokens do not depend on the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.diffusion.sampling import layout
from research.diffusion.sampling.candidates import (
  candidates,
  quota,
  remasked,
  without_placeholders,
)
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.generation import sampling as samplers
from research.generation.sampling import GREEDY, Sampling
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Rows while they are filled.

  Attributes:
    tokens: int32 `[B, T]`.
    masked: bool `[B, T]`, what is still to be filled.
    fixed: bool `[B, T]`, prompts, and whatever else was given.
    valid: bool `[B, T]`, False for padding, at either end of a row.
    keys: `[B]`.
    count: int32 `[B]`, steps in which a row took part.
    done: bool `[B]`, rows that have ended.
    filled: int32 `[B, T]`, the step that filled a place, -1 for none.
    confidence: float32 `[B, T]`, how probable a place's token was when it was
      filled, or put in place of another one.
    calls: int32, steps of the batch so far, each a call of the denoiser.
  """

  tokens: Any
  masked: Any
  fixed: Any
  valid: Any
  keys: Any
  count: Any
  done: Any
  filled: Any
  confidence: Any
  calls: Any


@dataclasses.dataclass(frozen=True)
class Sampled:
  """What `sample` returns.

  Attributes:
    tokens: int32 `[B, T]`, prompts included.
    filled: int32 `[B, T]`, the step that filled a place, -1 elsewhere.
    calls: forward passes of the model on the batch, for logits (NFE): one a
      step, with guidance two; not those that only fill a cache.
    counts: int32 `[B]`, those in which each row took part.
    lengths: int32 `[B]`, generated tokens before the first end.
  """

  tokens: np.ndarray
  filled: np.ndarray
  calls: int
  counts: np.ndarray
  lengths: np.ndarray

  @property
  def tokens_per_call(self) -> float:
    """Returns tokens before an end for each forward pass of a row."""
    return float(self.lengths.sum() / max(self.counts.sum(), 1))


def start(
  prompts: list[list[int]],
  config: SamplerConfig,
  key: PRNGKey,
  examples: Int[Array, "B"] | None = None,
  width: int | None = None,
) -> State:
  """Returns rows of prompts, padded on the left, and masks.

  Args:
    prompts, config, key: as they are for the whole batch.
    examples: each row's number, which its own key is derived from.
    width: places for prompts, at least the longest one's; by default those. See
      `layout.width`.

  Raises:
    UserError: there is no prompt, or one holds the mask.
  """
  checked_config(config)
  layout.check_prompts(prompts, config.mask_id)
  width = max([width or 0, *map(len, prompts)])
  masks = [config.mask_id] * config.length
  rows = [[*prompt, *masks] for prompt in prompts]
  padded = layout.pad_rows(rows, config.mask_id, config.length, width)
  return begin(padded.tokens, padded.masked, padded.valid, key, examples)


def begin(
  tokens: Int[Array, "B T"] | np.ndarray,
  masked: Bool[Array, "B T"] | np.ndarray,
  valid: Bool[Array, "B T"] | np.ndarray,
  key: PRNGKey,
  examples: Int[Array, "B"] | None = None,
) -> State:
  """Returns rows in which any places are to be filled: infilling."""
  rows = tokens.shape[0]
  if examples is None:
    examples = jnp.arange(rows)
  zero = jnp.zeros(rows, jnp.int32)
  return State(
    tokens=jnp.asarray(tokens, jnp.int32),
    masked=jnp.asarray(masked),
    fixed=jnp.asarray(~masked),
    valid=jnp.asarray(valid),
    keys=samplers.row_keys(key, examples),
    count=zero,
    done=zero > 0,
    filled=jnp.full(tokens.shape, -1, jnp.int32),
    confidence=jnp.ones(tokens.shape, jnp.float32),
    calls=jnp.int32(0),
  )


def sample(
  denoiser: Denoiser,
  params: Params,
  state: State,
  config: SamplerConfig,
  sampling: Sampling = GREEDY,
  look: Callable[[State], None] | None = None,
) -> Sampled:
  """Returns filled rows.

  Args:
    denoiser: the model.
    params: its parameters.
    state: from `start` or `begin`; of its last `config.length` places what is
      masked is filled, block after block. It stays as it is.
    config: how.
    sampling: how candidates are drawn; greedy by default.
    look: called after each block, to show it.

  Raises:
    UserError: logits are not finite, candidates cannot be drawn so, or rows do
      not lie where the settings and the model have their blocks.
  """
  if checked_config(config).canvas is not None:
    raise UserError(
      "sampler: canvas is one that grows, which variable_length.sample fills"
    )
  check_sampling(sampling)
  check_rows(denoiser, state, config)
  state = tree.device_put_like(state, params)
  total, memory, block_config = state.tokens.shape[1], None, config.of_block
  fillable = np.asarray(~state.fixed).any(0)
  for at in range(total - config.length, total, config.block):
    if not fillable[at : at + config.block].any():
      memory = None  # who goes on behind it reads all of it
      continue
    if bool(state.done.all()):
      break
    if denoiser.caches_finished:
      memory = cache_finished(
        denoiser, params, state, jnp.int32(at), config.block, memory
      )
    state, finite, memory = fill_block(
      denoiser, params, state, jnp.int32(at), block_config, sampling, memory
    )
    checked(finite, f"of the block at {at}")
    if look is not None:
      look(state)
  return result(state, config, denoiser.passes)


def checked_config(config: SamplerConfig) -> SamplerConfig:
  """Returns settings that are a model's; raises UserError for others."""
  if config.mask_id is None:
    raise UserError(
      "sampler: mask_id is None, expected settings for a model's rows; "
      "SamplerConfig.for_model returns them"
    )
  return config


def check_sampling(sampling: Sampling) -> None:
  """Raises UserError if candidates cannot be drawn so."""
  samplers.check(sampling)
  if sampling.repetition_penalty is not None:
    raise UserError(
      f"sampler: repetition_penalty is {sampling.repetition_penalty}, expected "
      "None: masks are filled in any order, and tokens are not penalized for "
      "those that are there"
    )


def check_rows(denoiser: Denoiser, state: State, config: SamplerConfig) -> None:
  """Raises UserError for rows that would be filled elsewhere than they lie.

  Args:
    denoiser, state, config: as for `sample`.
  """
  places = state.tokens.shape[1]
  first, unit = places - config.length, denoiser.unit
  if first < 0:
    raise UserError(
      f"sampler: found rows of {places} places, expected no fewer than "
      f"{config.show('length')}"
    )
  if np.asarray(state.masked)[:, :first].any():
    raise UserError(
      f"sampler: found masks before the last {config.length} places of a row, "
      "which are all that is filled; expected none, or a larger length"
    )
  if unit == 1:
    return
  begins = np.argmax(np.asarray(state.valid), axis=-1)
  if (begins % unit).any() or first % unit:
    begin = begins[np.argmax(begins % unit)]
    raise UserError(
      f"sampler: found a row that begins at {begin} and places to fill from "
      f"{first} on, expected multiples of {unit}, the model's block, which "
      "begin where rows do; lay them by layout.pad_rows, for sampler.begin"
    )
  if unit % config.block:
    raise UserError(
      f"sampler: found {config.show('block')}, expected a divisor of {unit}, "
      "the model's block"
    )


def checked(finite: Bool[Array, ""], where: str) -> None:
  """Raises UserError unless the logits from `where` are finite."""
  if not bool(finite):
    raise UserError(
      f"sampler: logits {where} are not finite numbers; are these the model's "
      "weights?"
    )


def result(state: State, config: SamplerConfig, each: int = 1) -> Sampled:
  """Returns what is reported of filled rows; a step took `each` passes."""
  tokens = np.asarray(state.tokens)
  fillable = ~np.asarray(state.fixed)[:, -config.length :]
  ended = fillable & np.isin(tokens[:, -config.length :], config.end)
  before = fillable & ~np.logical_or.accumulate(ended, axis=-1)
  return Sampled(
    tokens,
    np.asarray(state.filled),
    int(state.calls) * each,
    np.asarray(state.count) * each,
    before.sum(-1, dtype=np.int32),
  )


@functools.partial(
  jax.jit, static_argnames=("denoiser", "size"), donate_argnames=("memory",)
)
def cache_finished(
  denoiser: Denoiser,
  params: Params,
  state: State,
  at: Int[Array, ""],
  size: int,
  memory: Any,
) -> Any:
  """Returns what a denoiser keeps of all before a block.

  Args:
    denoiser: one that `caches_finished`.
    params: parameters of its model.
    state: rows.
    at: where the block starts.
    size: tokens in a block.
    memory: what the block before has left, which is donated, or None; see
      `Denoiser.cache_finished`.
  """
  return denoiser.cache_finished(
    params, state.tokens, state.valid, at, size, memory
  )


@functools.partial(
  jax.jit, static_argnames=("denoiser", "config"), donate_argnames=("memory",)
)
def fill_block(
  denoiser: Denoiser,
  params: Params,
  state: State,
  at: Int[Array, ""],
  config: SamplerConfig,
  sampling: Sampling = GREEDY,
  memory: Any = None,
) -> tuple[State, Bool[Array, ""], Any]:
  """Returns rows with the block at `at` filled.

  Args:
    denoiser, params, config, sampling: as for `sample`.
    state: rows.
    at: where the block starts.
    memory: what a denoiser's `cache_finished` returned; None to look at whole
      rows. It is donated, so that a cache is not there twice.

  Returns:
    Rows, whether logits were finite, and what the block's last call has left
    of `memory`, from which `cache_finished` goes on; None without.
  """
  size = config.block
  planned = jnp.where(state.done, 0, cut(state.masked, at, size).sum(-1))
  # Each step fills a place of every row that has some; a plan may take more.
  most = config.block_steps
  if config.remask is None:
    most = max(size, most)

  def unfinished(state, i):
    """Returns which rows have a place to be filled, now or once more."""
    open_ = cut(state.masked, at, size)
    if config.remask is not None:
      open_ |= ~cut(state.fixed, at, size)  # masked again, perhaps
    return open_.any(-1) & ~state.done & (i < most)

  def has_work(loop):
    state, i, edits, *_ = loop
    go = unfinished(state, i)
    return (go if config.edit is None else go | edits).any()

  def step(loop):
    state, i, edits, spare, carry, finite = loop
    logits, carry = denoiser.step(
      params, state.tokens, state.valid, at, size, carry
    )
    logits = without_placeholders(logits, params)
    spare -= ~unfinished(state, i)
    state, edits = fill(state, logits, at, config, sampling, planned, i, edits)
    edits &= unfinished(state, i + 1) | (spare > 0)
    return state, i + 1, edits, spare, carry, finite & _finite(logits)

  predict = denoiser.prefill if memory is None else denoiser.step
  carried = () if memory is None else (memory,)
  logits, carry = predict(params, state.tokens, state.valid, at, size, *carried)
  logits = without_placeholders(logits, params)
  state, edits = fill(state, logits, at, config, sampling, planned, 0)
  carry = jax.tree.map(jnp.asarray, carry)
  # Edits of a full row are limited, however early it was full.
  spare = jnp.full_like(planned, config.edit_steps)
  edits &= unfinished(state, 1) | (spare > 0)
  loop = state, jnp.int32(1), edits, spare, carry, _finite(logits)
  state, *_, carry, finite = jax.lax.while_loop(has_work, step, loop)
  if config.stop_early and config.end:
    state = ended(state, at, config)
  return state, finite, None if memory is None else carry


def _finite(logits: Float[Array, "B K V"]) -> Bool[Array, ""]:
  """Whether no logit is NaN or plus infinity, and some are finite."""
  return jnp.isfinite(logits.max(-1)).all()


def cut(x: Array, at: Array, size: int) -> Array:
  """Returns what a block has of each row."""
  return jax.lax.dynamic_slice_in_dim(x, at, size, axis=1)


def _put(x: Array, new: Array, at: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, 1)


Proposed = tuple[Int[Array, "B K"], Float[Array, "B K"], Float[Array, "B K"]]
"""Each place's candidate, its confidence, and its probability."""


def proposals(
  state: State,
  logits: Float[Array, "B K V"],
  config: SamplerConfig,
  sampling: Sampling,
) -> Proposed:
  """Returns what `candidates` proposes for a block, by the rows' own keys."""
  return candidates(logits, _keys(state), config, sampling)


def _keys(state: State) -> PRNGKey:
  return jax.vmap(jax.random.fold_in)(state.keys, state.count)


def fill(
  state: State,
  logits: Float[Array, "B K V"],
  at: Int[Array, ""],
  config: SamplerConfig,
  sampling: Sampling,
  planned: Int[Array, "B"],
  i: Int[Array, ""] | int,
  edits: Bool[Array, "B"] | None = None,
  proposed: Proposed | None = None,
) -> tuple[State, Bool[Array, "B"]]:
  """Returns rows after one step of a block, and which of them changed.

  Args:
    state: rows.
    logits: the denoiser's for the block.
    at: where the block starts.
    config, sampling: as for `sample`.
    planned: how many masks the block had at first.
    i: steps of this block so far.
    edits: rows that the step before changed; others are not edited. None for
      a block's first step.
    proposed: `proposals` of the logits, of who needs them besides.
  """
  size = config.block
  tokens, masked = (cut(x, at, size) for x in (state.tokens, state.masked))
  fillable = ~cut(state.fixed, at, size)
  free = fillable & ~masked & ~state.done[:, None]
  active = masked.any(-1) & ~state.done
  if proposed is None:
    proposed = proposals(state, logits, config, sampling)
  candidate, confidence, chance = proposed
  eligible = masked & active[:, None]
  count = quota(config, planned, masked.sum(-1), i, _keys(state))
  kept = config.policy.commit(confidence, eligible, count) & eligible
  new, changed = jnp.where(kept, candidate, tokens), kept
  edited, taking_part = jnp.zeros_like(active), active
  if config.edit is not None:
    taking_part = ~state.done & fillable.any(-1)
    if edits is not None:
      taking_part &= active | edits
    other = free & (candidate != tokens) & (chance > config.edit)
    other &= taking_part[:, None]
    # What was filled now is predicted once more, too.
    changed = other | kept
    new, edited = jnp.where(other, candidate, new), changed.any(-1)
  calls = state.calls + 1
  filled = jnp.where(kept, state.calls, cut(state.filled, at, size))
  before = cut(state.confidence, at, size)
  again = remasked(config, before, free, i, _keys(state))
  if config.remask is not None:
    new = jnp.where(again, config.mask_id, new)
    filled = jnp.where(again, -1, filled)
    # All planned steps; longer, who is still edited.
    taking_part |= ~state.done & fillable.any(-1) & (i < config.block_steps)
  state = dataclasses.replace(
    state,
    tokens=_put(state.tokens, new, at),
    masked=_put(state.masked, (masked & ~kept) | again, at),
    filled=_put(state.filled, filled, at),
    confidence=_put(state.confidence, jnp.where(changed, chance, before), at),
    count=state.count + taking_part,
    calls=calls,
  )
  return state, edited


def ended(state: State, at: Array, config: SamplerConfig) -> State:
  """Returns rows that have ended, filled up with their end."""
  place = jnp.arange(state.tokens.shape[1])
  made = ~state.fixed & (place < at + config.block) & ~state.masked
  ends = made & jnp.isin(state.tokens, jnp.array(config.end))
  # Only an end with nothing open before it.
  first = jnp.where(ends.any(-1), jnp.argmax(ends, axis=-1), place.size)
  open_before = (state.masked & (place < first[:, None])).any(-1)
  ending = ends.any(-1) & ~open_before & ~state.done
  last = jnp.take_along_axis(
    state.tokens, jnp.minimum(first, place.size - 1)[:, None], axis=1
  )
  after_end = ending[:, None] & (place > first[:, None]) & ~state.fixed
  return dataclasses.replace(
    state,
    tokens=jnp.where(after_end, last, state.tokens),
    masked=state.masked & ~after_end,
    done=state.done | ending,
  )
