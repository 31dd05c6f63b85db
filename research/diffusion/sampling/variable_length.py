"""Answers of no fixed length: a canvas that grows while it is filled.

DAEDAL (Li et al. 2025, arXiv:2508.00819), for models all of whose tokens see
each other, and without training. An answer starts short. A model that does not
expect it to end at the canvas's end gets more masks there, until it does; then
blocks are filled as ever, and while the end is in doubt the least sure place of
a block becomes several.

Shapes are static: rows are as long as the longest canvas allowed, and what is
not of a row's own is padding, which nothing sees. So a length is data, prompts
share a program, and a row grows by what it holds itself, whatever its batch.
Every call reads whole canvases and forms their logits: what is inserted moves
all behind it, so that nothing of them can be kept from call to call. What
stands before them does not move: `BlockCache` keeps its keys and values from a
block's first call on.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.diffusion.sampling import sampler
from research.diffusion.sampling.candidates import without_placeholders
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.diffusion.sampling.sampler import Sampled, State
from research.generation.sampling import GREEDY, Sampling
from research.typing import (
  Array,
  Bool,
  Float,
  Int,
  Params,
  PRNGKey,
  UserError,
)


@dataclasses.dataclass(frozen=True)
class VariableLengthResult(Sampled):
  """What `sample` returns; behind a row's canvas its tokens are ends.

  Calls and counts include those that only looked how long a canvas has to be.

  Attributes:
    canvas: int32 `[B]`, places of each row's canvas in the end.
  """

  canvas: np.ndarray


def start(
  prompts: list[list[int]],
  config: SamplerConfig,
  key: PRNGKey,
  examples: Int[Array, "B"] | None = None,
  width: int | None = None,
) -> State:
  """Returns rows of prompts and canvases as they begin, see `sampler.start`.

  Raises:
    UserError: there is no prompt, one holds the mask, or no canvas grows.
  """
  growth = _growth(config)
  state = sampler.start(prompts, config, key, examples, width)
  size = jnp.full(len(prompts), growth.first_length(config.length), jnp.int32)
  return _blank(state, size, config)


def sample(
  denoiser: Denoiser,
  params: Params,
  state: State,
  config: SamplerConfig,
  sampling: Sampling = GREEDY,
  look: Callable[[State], None] | None = None,
) -> VariableLengthResult:
  """Returns filled rows, each as long as it had to be.

  Args:
    denoiser: the model; asked for whole canvases at every call. One with a
      cache takes all of a canvas for a block: `BlockCache()` reads it
      again.
    params: its parameters.
    state: from `start`. It stays as it is.
    config: how; `length` is that of the longest canvas, for which there is
      room in the state. `Quota` fills a place a call.
    sampling: how candidates are drawn; greedy by default.
    look: called after each block, to show it.

  Raises:
    UserError: logits are not finite, no canvas grows, candidates cannot be
      drawn so, or the model has blocks.
  """
  _growth(config)
  sampler.check_sampling(sampling)
  if denoiser.unit > 1:
    raise UserError(
      f"variable_length: found a model with blocks of {denoiser.unit} tokens, "
      "expected one with bidirectional attention: the tokens after a canvas "
      "decide whether it grows"
    )
  state = tree.device_put_like(state, params)
  width = state.tokens.shape[1] - config.length
  state, looked, finite = _measured(denoiser, params, state, config)
  sampler.checked(finite, "while the canvas's length was looked for")
  for at in range(width, state.tokens.shape[1], config.block):
    if not bool(state.masked.any()):
      break
    state, finite = grow_block(
      denoiser, params, state, jnp.int32(at), config, sampling
    )
    sampler.checked(finite, f"of the block at {at}")
    if look is not None:
      look(state)
  each = denoiser.passes
  got = sampler.result(state, config, each)
  return VariableLengthResult(
    got.tokens,
    got.filled,
    got.calls,
    got.counts + np.asarray(looked) * each,
    got.lengths,
    np.asarray(_size(state, config)),
  )


def _growth(config: SamplerConfig) -> Growth:
  """Returns how canvases grow; raises UserError where they do not."""
  if config.canvas is None:
    raise UserError(
      "variable_length: canvas is None, expected a Growth; sampler.sample "
      "fills rows of a fixed length"
    )
  return config.canvas


def _size(state: State, config: SamplerConfig) -> Int[Array, "B"]:
  """Returns how many places each canvas has."""
  return state.valid[:, -config.length :].sum(-1, dtype=jnp.int32)


def _blank(state: State, size: Int[Array, "B"], config: SamplerConfig) -> State:
  """Returns rows with canvases of so many masks, and nothing else in them."""
  total = state.tokens.shape[1]
  place = jnp.arange(total) - (total - config.length)
  own = (place >= 0) & (place < size[:, None])
  # What will never be of the canvas reads as an end, and counts as one.
  empty = jnp.where(own, config.mask_id, config.end[0])
  return dataclasses.replace(
    state,
    tokens=jnp.where(place < 0, state.tokens, empty).astype(jnp.int32),
    masked=own,
    fixed=~own,
    valid=jnp.where(place < 0, state.valid, own),
  )


def _call(denoiser, params, state, config, i=0, carry=()):
  """Returns canvases' logits and a carry: a block's first call, or a later."""
  most = config.length
  width = jnp.int32(state.tokens.shape[1] - most)
  given = params, state.tokens, state.valid, width, most
  if not jax.tree.leaves(carry):
    logits, carry = denoiser.prefill(*given)
  else:
    logits, carry = jax.lax.cond(
      i == 0,
      lambda: denoiser.prefill(*given),
      lambda: denoiser.step(*given, carry),
    )
  return without_placeholders(logits, params), carry


def _nothing(denoiser, params, state, config):
  """Returns a carry in which nothing is kept yet."""
  _, carry = jax.eval_shape(lambda: _call(denoiser, params, state, config))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)


def _judged(logits, state, config):
  """Returns canvases' readiness, and whether their logits are finite."""
  most = config.length
  own = state.valid[:, -most:]
  ready = end_confidence(
    logits,
    state.tokens[:, -most:],
    state.masked[:, -most:],
    own,
    config,
    config.canvas.window,
  )
  # Nobody asks what the room to grow would hold.
  largest = jnp.where(own, logits.max(-1), 0.0)
  return ready, jnp.isfinite(largest).all()


@functools.partial(jax.jit, static_argnames=("denoiser", "config"))
def _measured(
  denoiser: Denoiser,
  params: Params,
  state: State,
  config: SamplerConfig,
) -> tuple[State, Int[Array, "B"], Bool[Array, ""]]:
  """Returns canvases long enough to begin, and how often each was looked at.

  The paper's initial length adjustment. A canvas that cannot grow is not
  looked at.
  """
  most = config.length

  def more(loop):
    return loop[1].any()

  def step(loop):
    size, open_, looked, calls, finite = loop
    now = _blank(state, size, config)
    logits, _ = _call(denoiser, params, now, config)
    ready, fine = _judged(logits, now, config)
    short = open_ & (ready < config.canvas.eos_threshold)
    size = jnp.where(short, jnp.minimum(size + config.canvas.by, most), size)
    looked = looked + open_
    return size, short & (size < most), looked, calls + 1, finite & fine

  size = _size(state, config)
  zero = jnp.zeros_like(size)
  loop = size, size < most, zero, state.calls, jnp.ones((), bool)
  size, _, looked, calls, finite = jax.lax.while_loop(more, step, loop)
  state = dataclasses.replace(_blank(state, size, config), calls=calls)
  return _with_ends(state, size, config), looked, finite


def _with_ends(
  state: State, size: Int[Array, "B"], config: SamplerConfig
) -> State:
  """Returns canvases that are longer by ends, as many as there is room for."""
  total = state.tokens.shape[1]
  place = jnp.arange(total) - (total - config.length)
  new = (place >= size[:, None]) & (place < size[:, None] + config.canvas.ends)
  return dataclasses.replace(
    state, valid=state.valid | new, fixed=state.fixed & ~new
  )


@functools.partial(jax.jit, static_argnames=("denoiser", "config"))
def grow_block(
  denoiser: Denoiser,
  params: Params,
  state: State,
  at: Int[Array, ""],
  config: SamplerConfig,
  sampling: Sampling = GREEDY,
) -> tuple[State, Bool[Array, ""]]:
  """Returns rows with the block at `at` filled, and whether logits were finite.

  As `sampler.fill_block`, but that a call may insert masks in a row: the
  paper's iterative mask insertion.

  Args:
    denoiser, params, config, sampling: as for `sample`.
    state: rows.
    at: where the block starts.
  """
  size, growth = config.block, config.canvas
  width = state.tokens.shape[1] - config.length
  # A place a call by plan, however many there will be.
  planned = jnp.full(state.tokens.shape[0], size)

  def more(loop):
    state, i, *_ = loop
    # Each call fills a place of each row that has some.
    return sampler.cut(state.masked, at, size).any() & (i < config.length)

  def step(loop):
    state, i, finite, carry = loop
    logits, carry = _call(denoiser, params, state, config, i, carry)
    ready, fine = _judged(logits, state, config)
    own = sampler.cut(logits, at - width, size)
    proposed = sampler.proposals(state, own, config, sampling)
    filled, _ = sampler.fill(
      state, own, at, config, sampling, planned, 0, proposed=proposed
    )
    doubt = sampler.cut(filled.masked, at, size)
    doubt &= (proposed[-1] < growth.low_threshold) & (
      ready < growth.expand_threshold
    )[:, None]
    room = config.length - _size(filled, config)
    extra = jnp.where(doubt.any(-1), jnp.minimum(growth.by - 1, room), 0)
    least = jnp.argmin(jnp.where(doubt, proposed[-1], jnp.inf), axis=-1)
    state = _inserted(filled, at + least, extra, config.mask_id)
    return state, i + 1, finite & fine, carry

  carry = _nothing(denoiser, params, state, config)
  loop = state, jnp.int32(0), jnp.ones((), bool), carry
  state, _, finite, _ = jax.lax.while_loop(more, step, loop)
  if config.stop_early:
    state = sampler.ended(state, at, config)
  return state, finite


def _inserted(
  state: State,
  place: Int[Array, "B"],
  count: Int[Array, "B"],
  mask_id: int,
) -> State:
  """Returns rows with masks behind a place, and what was there behind them."""
  index = jnp.arange(state.tokens.shape[1])
  place, count = place[:, None], count[:, None]
  new = (index > place) & (index <= place + count)
  source = jnp.where(index > place, jnp.maximum(index - count, place), index)

  def moved(x, value):
    x = jnp.take_along_axis(x, source, axis=1)
    return jnp.where(new, jnp.asarray(value, x.dtype), x)

  return dataclasses.replace(
    state,
    tokens=moved(state.tokens, mask_id),
    masked=moved(state.masked, True),
    fixed=moved(state.fixed, False),
    valid=moved(state.valid, True),
    filled=moved(state.filled, -1),
    confidence=moved(state.confidence, 1.0),
  )


def end_confidence(
  logits: Float[Array, "B M V"],
  tokens: Int[Array, "B M"],
  masked: Bool[Array, "B M"],
  own: Bool[Array, "B M"],
  config: SamplerConfig,
  window: int,
) -> Float[Array, "B"]:
  """Returns how sure the model is that canvases end where they do, 0 to 1.

  The mean probability of the last `window` places that would be an end, of as
  many as there are, the missing ones counted as 0. What is filled already is
  what it is: a model's logits of places that it sees mean nothing (the authors
  use them all the same).

  Args:
    logits: of canvases, with room to grow.
    tokens: in them.
    masked: what is still to be filled.
    own: False for the room to grow.
    config: with the mask and the ends.
    window: W.
  """
  logits = logits.astype(jnp.float32).at[..., config.mask_id].set(-jnp.inf)
  likeliest = jnp.where(masked, jnp.argmax(logits, axis=-1), tokens)
  sure = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
  ends = jnp.isin(likeliest, jnp.array(config.end)) & own
  last = jnp.cumsum(ends[:, ::-1], axis=-1)[:, ::-1] <= window
  counted = jnp.where(masked, sure, 1.0)
  return jnp.where(ends & last, counted, 0.0).sum(-1) / window
