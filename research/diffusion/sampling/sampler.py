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
from research.diffusion.sampling.candidates import Options, candidates
from research.diffusion.sampling.denoiser import Denoiser, passes
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
    sure: float32 `[B, T]`, how probable a place's token was when it was filled.
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
  sure: Any
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
  options: Options,
  key: PRNGKey,
  examples: Int[Array, "B"] | None = None,
  width: int | None = None,
) -> State:
  """Returns rows of prompts, padded on the left, and masks.

  Args:
    prompts, options, key: as they are for the whole batch.
    examples: each row's number, which its own key is derived from.
    width: places for prompts, at least the longest one's; by default those. See
      `layout.width`.

  Raises:
    UserError: there is no prompt, or one holds the mask.
  """
  layout.check_prompts(prompts, options.mask_id)
  width = max([width or 0, *map(len, prompts)])
  masks = [options.mask_id] * options.length
  rows = [[*prompt, *masks] for prompt in prompts]
  laid = layout.lay(rows, options.mask_id, options.length, width)
  return begin(laid.tokens, laid.masked, laid.valid, key, examples)


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
    sure=jnp.ones(tokens.shape, jnp.float32),
    calls=jnp.int32(0),
  )


def sample(
  denoiser: Denoiser,
  params: Params,
  state: State,
  options: Options,
  sampling: Sampling = GREEDY,
  look: Callable[[State], None] | None = None,
) -> Sampled:
  """Returns filled rows.

  Args:
    denoiser: the model.
    params: its parameters.
    state: from `start` or `begin`; of its last `options.length` places what is
      masked is filled, block after block. It stays as it is.
    options: how.
    sampling: how candidates are drawn; greedy by default.
    look: called after each block, to show it.

  Raises:
    UserError: logits are not finite.
  """
  state = tree.device_put_like(state, params)
  total, memory, one = state.tokens.shape[1], None, options.of_block
  ours = np.asarray(~state.fixed).any(0)
  for at in range(total - options.length, total, options.block):
    if not ours[at : at + options.block].any():
      memory = None  # who goes on behind it reads all of it
      continue
    if bool(state.done.all()):
      break
    if hasattr(denoiser, "remember"):
      memory = _remembered(
        denoiser, params, state, jnp.int32(at), options.block, memory
      )
    state, finite, memory = fill_block(
      denoiser, params, state, jnp.int32(at), one, sampling, memory
    )
    checked(finite, f"of the block at {at}")
    if look is not None:
      look(state)
  return result(state, options, passes(denoiser))


def checked(finite: Bool[Array, ""], where: str) -> None:
  """Raises UserError unless the logits from `where` are finite."""
  if not bool(finite):
    raise UserError(
      f"sampler: logits {where} are not finite numbers; are these the model's "
      "weights?"
    )


def result(state: State, options: Options, each: int = 1) -> Sampled:
  """Returns what is told of rows whose last `options.length` are filled.

  `each` is how many forward passes a step took.
  """
  tokens = np.asarray(state.tokens)
  ours = ~np.asarray(state.fixed)[:, -options.length :]
  ended = ours & np.isin(tokens[:, -options.length :], options.end)
  before = ours & ~np.logical_or.accumulate(ended, axis=-1)
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
def _remembered(denoiser, params, state, at, size, memory):
  """Returns what a denoiser remembers of all before a block."""
  return denoiser.remember(params, state.tokens, state.valid, at, size, memory)


@functools.partial(
  jax.jit, static_argnames=("denoiser", "options"), donate_argnames=("memory",)
)
def fill_block(
  denoiser: Denoiser,
  params: Params,
  state: State,
  at: Int[Array, ""],
  options: Options,
  sampling: Sampling = GREEDY,
  memory: Any = None,
) -> tuple[State, Bool[Array, ""], Any]:
  """Returns rows with the block at `at` filled.

  Args:
    denoiser, params, options, sampling: as for `sample`.
    state: rows.
    at: where the block starts.
    memory: what a denoiser's `remember` returned; None to look at whole rows.
      It is donated, so that a cache is not there twice.

  Returns:
    Rows, whether logits were finite, and what the block's last call has left
    of `memory`, from which `remember` goes on; None without.
  """
  size = options.block
  planned = jnp.where(state.done, 0, cut(state.masked, at, size).sum(-1))
  # Each step fills a place of every row that has some; a plan may take more.
  most = options.block_steps
  if options.remask is None:
    most = max(size, most)

  def unfinished(state, i):
    """Returns which rows have a place to be filled, now or once more."""
    open_ = cut(state.masked, at, size)
    if options.remask is not None:
      open_ |= ~cut(state.fixed, at, size)  # masked again, perhaps
    return open_.any(-1) & ~state.done & (i < most)

  def more(loop):
    state, i, edits, *_ = loop
    go = unfinished(state, i)
    return (go if options.edit is None else go | edits).any()

  def step(loop):
    state, i, edits, spare, carry, finite = loop
    given = params, state.tokens, state.valid, at, size
    logits, carry = denoiser.again(*given, carry)
    spare -= ~unfinished(state, i)
    state, edits = fill(state, logits, at, options, sampling, planned, i, edits)
    edits &= unfinished(state, i + 1) | (spare > 0)
    return state, i + 1, edits, spare, carry, finite & _finite(logits)

  ask = denoiser.first if memory is None else denoiser.again
  left = () if memory is None else (memory,)
  logits, carry = ask(params, state.tokens, state.valid, at, size, *left)
  state, edits = fill(state, logits, at, options, sampling, planned, 0)
  carry = jax.tree.map(jnp.asarray, carry)
  # Edits of a full row are limited, however early it was full.
  spare = jnp.full_like(planned, options.edit_steps)
  edits &= unfinished(state, 1) | (spare > 0)
  loop = state, jnp.int32(1), edits, spare, carry, _finite(logits)
  state, *_, carry, finite = jax.lax.while_loop(more, step, loop)
  if options.stop and options.end:
    state = ended(state, at, options)
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
  options: Options,
  sampling: Sampling,
) -> Proposed:
  """Returns what `candidates` proposes for a block, by the rows' own keys."""
  return candidates(logits, _keys(state), options, sampling)


def _keys(state: State) -> PRNGKey:
  return jax.vmap(jax.random.fold_in)(state.keys, state.count)


def fill(
  state: State,
  logits: Float[Array, "B K V"],
  at: Int[Array, ""],
  options: Options,
  sampling: Sampling,
  planned: Int[Array, "B"],
  i: Int[Array, ""] | int,
  edits: Bool[Array, "B"] | None = None,
  proposed: Proposed | None = None,
) -> tuple[State, Bool[Array, "B"]]:
  """Returns rows after one step of a block, and which of them changed.

  Args:
    state: rows.
    logits: of the block.
    at: where it starts.
    options, sampling: as for `sample`.
    planned: how many masks the block had at first.
    i: steps of this block so far.
    edits: rows that the step before changed; others are not edited. None for
      a block's first step.
    proposed: `proposals` of the logits, of who needs them besides.
  """
  size = options.block
  tokens, masked = (cut(x, at, size) for x in (state.tokens, state.masked))
  ours = ~cut(state.fixed, at, size)
  free = ours & ~masked & ~state.done[:, None]
  active = masked.any(-1) & ~state.done
  if proposed is None:
    proposed = proposals(state, logits, options, sampling)
  found, sure, chance = proposed
  eligible = masked & active[:, None]
  quota = options.quota(planned, masked.sum(-1), i, _keys(state))
  kept = options.policy.commit(sure, eligible, quota) & eligible
  new = jnp.where(kept, found, tokens)
  edited, taking_part = jnp.zeros_like(active), active
  if options.edit is not None:
    taking_part = ~state.done & ours.any(-1)
    if edits is not None:
      taking_part &= active | edits
    other = free & (found != tokens) & (chance > options.edit)
    other &= taking_part[:, None]
    # What was filled now is looked at once more, too.
    new, edited = jnp.where(other, found, new), (other | kept).any(-1)
  calls = state.calls + 1
  filled = jnp.where(kept, state.calls, cut(state.filled, at, size))
  before = cut(state.sure, at, size)
  again = options.again(before, free, i, _keys(state))
  if options.remask is not None:
    new = jnp.where(again, options.mask_id, new)
    filled = jnp.where(again, -1, filled)
    # All planned steps; longer, who is still edited.
    taking_part |= ~state.done & ours.any(-1) & (i < options.block_steps)
  state = dataclasses.replace(
    state,
    tokens=_put(state.tokens, new, at),
    masked=_put(state.masked, (masked & ~kept) | again, at),
    filled=_put(state.filled, filled, at),
    sure=_put(state.sure, jnp.where(kept, chance, before), at),
    count=state.count + taking_part,
    calls=calls,
  )
  return state, edited


def ended(state: State, at: Array, options: Options) -> State:
  """Returns rows that have ended, filled up with their end."""
  place = jnp.arange(state.tokens.shape[1])
  made = ~state.fixed & (place < at + options.block) & ~state.masked
  ends = made & jnp.isin(state.tokens, jnp.array(options.end))
  # Only an end with nothing open before it.
  first = jnp.where(ends.any(-1), jnp.argmax(ends, axis=-1), place.size)
  open_before = (state.masked & (place < first[:, None])).any(-1)
  now = ends.any(-1) & ~open_before & ~state.done
  last = jnp.take_along_axis(
    state.tokens, jnp.minimum(first, place.size - 1)[:, None], axis=1
  )
  rest = now[:, None] & (place > first[:, None]) & ~state.fixed
  return dataclasses.replace(
    state,
    tokens=jnp.where(rest, last, state.tokens),
    masked=state.masked & ~rest,
    done=state.done | now,
  )
