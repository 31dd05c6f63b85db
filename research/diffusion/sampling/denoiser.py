"""What a sampler asks of a model: logits of one block of a row.

A denoiser is a static value; what it keeps from step to step (a cache) is its
carry. `prefill` looks at the whole row, at a block's first step; `step` is any
later step of the same block, and may use what `prefill` has left. One that can
do without `prefill` says `caches_finished`, and carries what is known of
finished blocks to the next: see `block_causal.BlockCausal`.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research.diffusion.mask_ratio_time import MaskRatioTime
from research.nn import cache as caches
from research.nn.transformer import Transformer, init_cache
from research.typing import Array, Bool, Float, Int, Params


class Denoiser(abc.ABC):
  """Logits of tokens `[start, start + size)` of each row, and a carry."""

  @abc.abstractmethod
  def prefill(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    start: Int[Array, ""],
    size: int,
  ) -> tuple[Float[Array, "B K V"], Any]:
    """Returns logits and a carry of a block's first step."""

  @abc.abstractmethod
  def step(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    start: Int[Array, ""],
    size: int,
    carry: Any,
  ) -> tuple[Float[Array, "B K V"], Any]:
    """Returns logits and the carry of a later step of the block."""

  @property
  def passes(self) -> int:
    """Returns the model's forward passes in a call."""
    return 1

  @property
  def unit(self) -> int:
    """Returns the tokens of a block of the model, which begin where rows do.

    1 where all tokens see all.
    """
    return 1

  @property
  def caches_finished(self) -> bool:
    """Whether `cache_finished` takes the place of `prefill`."""
    return False

  def cache_finished(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    start: Int[Array, ""],
    size: int,
    memory: Any = None,
  ) -> Any:
    """Returns the carry of a block's first `step`: all before it, read.

    Args:
      params, tokens, valid, start, size: as for `prefill`.
      memory: what the last call of the block before has left, whose final
        tokens are all that is read now; None to read everything.
    """
    raise NotImplementedError


def positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """Returns positions that start at the first valid token; -1 for padding."""
  place = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
  return jnp.where(valid, place, -1)


def own_rows(
  hidden: Float[Array, "B T D"],
  start: Int[Array, ""],
  size: int,
  shift: bool,
  place: Int[Array, "B T"],
) -> Float[Array, "B K D"]:
  """Returns the hidden states that predict a block's own tokens.

  Args:
    hidden: hidden states of whole rows.
    start: index of the block's first token.
    size: tokens in the block, K.
    shift: whether a token is predicted by the state before it, as in models
      that began autoregressive (Dream, arXiv:2508.15487); the first token of
      a document has its own state alone, since what lies before it in the row
      is padding or another document.
    place: positions, from 0 in each document.
  """
  states = cut(hidden, start, size)
  if not shift:
    return states
  edge = cut(hidden, jnp.maximum(start - 1, 0), 1)
  return shifted(states, edge, cut(place, start, size))


def state_index(
  start: Int[Array, ""] | Int[Array, "B"],
  size: int,
  shift: bool,
  place: Int[Array, "B T"],
) -> Int[Array, "B K"]:
  """Returns where the states stand that `own_rows` returns."""
  index = jnp.reshape(start, (-1, 1)) + jnp.arange(size)
  index = jnp.broadcast_to(index, (place.shape[0], size))
  if not shift:
    return index
  block_place = jnp.take_along_axis(place, index, axis=1)
  return jnp.where(block_place == 0, index, jnp.maximum(index - 1, 0))


def cut(x: Array, start: Array, size: int) -> Array:
  """Returns part of each row, from the same place on or from each row's own."""
  if start.ndim == 0:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
  of_row = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
  return jax.vmap(of_row)(x, start)


def shifted(states: Array, edge: Array, place: Array) -> Array:
  """Returns a block's states, each from the place before it.

  Args:
    states: the block's hidden states.
    edge: state of the place before the block.
    place: the block's positions; a document's first token has its own state.
  """
  before = jnp.concatenate([edge, states[:, :-1]], axis=1)
  return jnp.where((place == 0)[..., None], states, before)


def ends(valid: Bool[Array, "B T"]) -> Int[Array, "B"]:
  """Returns where each row's last token ends."""
  return valid.shape[1] - jnp.argmax(valid[:, ::-1], axis=-1)


def visible(block: int | None, valid: Bool[Array, "B T"]) -> Mask:
  """Returns who sees whom in whole rows: all, or blocks before and its own.

  Args:
    block: block size of a block-causal model, from index 0; None: all tokens.
    valid: False for padding.
  """
  segments = jnp.where(valid, 0, -1)
  if block is None:
    return Mask.full(segments=segments)
  return Mask.block_causal(block, segments=segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoCache(Denoiser):
  """Every step reads the whole row, and only a block's logits are formed.

  Attributes:
    model: the Transformer.
    shift: see `own_rows`.
    block: tokens of a block of a block-causal model; None: all see all.
    time: by the masks of a row, for models that are conditioned on it.
  """

  model: Transformer
  shift: bool = False
  block: int | None = None
  time: MaskRatioTime | None = None

  @property
  def unit(self) -> int:
    return self.block or 1

  def scores(self, params, tokens, valid) -> Float[Array, "B T V"]:
    """Returns logits of every token: what likelihoods need."""
    hidden = self._hidden(params, tokens, valid)
    rows = own_rows(
      hidden, jnp.int32(0), tokens.shape[1], self.shift, positions(valid)
    )
    return self.model.apply({"params": params}, rows, method="logits")

  def _hidden(self, params, tokens, valid, keep=None):
    mask, time = visible(self.block, valid), None
    if self.time is not None and self.block is None:
      time = self.time.rows(tokens, valid)
    elif self.time is not None:
      time = self.time.blocks(tokens, valid, self.block)
    return self.model.apply(
      {"params": params}, tokens, positions(valid), mask, time=time, keep=keep
    )[0]

  def prefill(self, params, tokens, valid, start, size):
    keep = state_index(start, size, self.shift, positions(valid))
    hidden = self._hidden(params, tokens, valid, keep)
    return self.model.apply({"params": params}, hidden, method="logits"), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


def recompute(
  denoiser: Any,
  params: Params,
  tokens: Int[Array, "B T"],
  valid: Bool[Array, "B T"],
  reread: Int[Array, "B N"],
  place: Int[Array, "B N"],
  cache: caches.Cache,
  keep: Int[Array, "B K"] | None = None,
) -> tuple[Float[Array, "B K D"], caches.Cache]:
  """Returns states of places that are read again, and the cache with them.

  Args:
    denoiser: one whose cache holds all tokens of its rows: before the call,
      what it read of these places included, and after it.
    params: parameters of its model.
    tokens: whole rows; with `valid`, what a model's time comes from.
    valid: False for padding.
    reread: the tokens that are read.
    place: their positions; -1 for padding.
    cache: keys and values of all places.
    keep: which of the N places have states; None for all.
  """
  length = valid.sum(-1) - jnp.sum(place >= 0, axis=-1)
  cache = dataclasses.replace(
    cache, length=length.astype(jnp.int32), fresh=False
  )
  time = denoiser.time and denoiser.time.rows(tokens, valid)
  return denoiser.model.apply(
    {"params": params}, reread, place, Mask.full(), cache, time=time, keep=keep
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStepCache(Denoiser):
  """A cache that a block's first step fills, and its later steps read.

  Keys and values of the places that these read are their own, others the first
  step's.
  """

  model: Transformer
  shift: bool = False
  time: MaskRatioTime | None = None

  def prefill(self, params, tokens, valid, start, size):
    rows, length = tokens.shape
    cache = init_cache(self.model, params, rows, length, rings=False)
    hidden, cache = self.model.apply(
      {"params": params},
      tokens,
      positions(valid),
      visible(None, valid),
      cache,
      time=self.time and self.time.rows(tokens, valid),
      keep=state_index(start, size, self.shift, positions(valid)),
    )
    logits = self.model.apply({"params": params}, hidden, method="logits")
    # The state before the block predicts its first token later, too.
    return logits, (cache, hidden[:, :1])

  def states(self, params, tokens, valid, start, size, carry, low, span):
    """Returns a block's states and the carry, once some places are read.

    Args:
      params, tokens, valid, start, size, carry: as for `step`.
      low: where the places begin, of each row if rows differ.
      span: how many they are.
    """
    cache, edge = carry
    reread, place = (cut(x, low, span) for x in (tokens, positions(valid)))
    keep = state_index(start - low, size, self.shift, place)
    hidden, cache = recompute(
      self, params, tokens, valid, reread, place, cache, keep
    )
    if not self.shift:
      return hidden, (cache, edge)
    unread = jnp.reshape(start == low, (-1, 1, 1)) & (place[:, :1, None] != 0)
    hidden = hidden.at[:, :1].set(jnp.where(unread, edge, hidden[:, :1]))
    return hidden, (cache, edge)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCache(FirstStepCache):
  """Later steps of a block read the block and its neighbours alone.

  Keys and values of the rest are those of the block's first step: an
  approximation, since filling a place changes what all others see (Wu et al.
  2025, arXiv:2505.22618: with `before = after = 0` its dual cache; Ma et al.
  2025, dInfer: with some of each, its vicinity refresh). Exact at a block's
  first step.

  Attributes:
    model: the Transformer; all tokens see all.
    shift: see `own_rows`.
    before, after: how many tokens around the block are read again; where a
      row's text ends, more on the other side.
    time: by the masks of a row, for models that are conditioned on it.
  """

  before: int = 0
  after: int = 0

  def step(self, params, tokens, valid, start, size, carry):
    span = min(self.before + size + self.after, tokens.shape[1])
    low = self._low(valid, start, size, span)
    hidden, carry = self.states(
      params, tokens, valid, start, size, carry, low, span
    )
    logits = self.model.apply({"params": params}, hidden, method="logits")
    return logits, carry

  def _low(self, valid, start, size, span):
    """Returns where what is read again begins, of each row if they differ.

    It is what it would be if the row had no padding, so that the padding of a
    batch or of a shape changes nothing.
    """
    if not self.before and not self.after:
      return start
    length = valid.shape[1]
    first = jnp.argmax(valid, axis=-1)
    # A block may reach beyond its row's text.
    high = jnp.maximum(ends(valid), start + size) - span
    return jnp.minimum(
      jnp.clip(start - self.before, first, jnp.maximum(high, first)),
      length - span,
    )
