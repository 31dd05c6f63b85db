"""Keys and values kept from a step after their token was filled in.

Ma et al. 2025 (dKV-Cache, arXiv:2505.15781): what a place says to others
changes most when it turns from a mask into a token. So a call reads all masks,
and what was filled by the call before it; everything else is as it was when it
was last read. Every so many calls all is read again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.diffusion.mask_ratio_time import MaskRatioTime
from research.diffusion.sampling.config import Delayed
from research.diffusion.sampling.denoiser import (
  Denoiser,
  positions,
  recompute,
  state_index,
)
from research.nn.transformer import Transformer, init_cache
from research.typing import Array, Bool, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DelayedCarry:
  """What is kept from call to call.

  Attributes:
    cache: keys and values of all places.
    read_tokens: int32 `[B, T]`, the token that each place was when it was read.
    hidden: `[B, K, D]`, the states that predict the block's tokens, each of
      when its place was read.
    calls: int32, since all was read.
  """

  cache: Any
  read_tokens: Any
  hidden: Any
  calls: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedKVCache(Delayed, Denoiser):
  """Later calls of a block read masks, and what has changed since the last.

  Shapes are static, so a call reads T, T/2, T/4 .. places, the fewest that do
  for all rows; the rest of them is padding, so that rows do not depend on each
  other. It is one program with a branch for each. A block's first call reads
  all: where the whole text is one block, as in the paper, that is the first.

  Attributes:
    model: the Transformer; all tokens see all.
    mask_id: of the mask.
    shift: see `own_rows`; the place before a mask, whose state predicts it, is
      read with it.
    refresh, halvings: see `config.Delayed`.
    time: by the masks of a row, for models that are conditioned on it.
  """

  model: Transformer
  mask_id: int
  shift: bool = False
  time: MaskRatioTime | None = None

  def prefill(self, params, tokens, valid, start, size):
    rows, length = tokens.shape
    kept = DelayedCarry(
      cache=init_cache(self.model, params, rows, length, rings=False),
      read_tokens=jnp.full_like(tokens, -1),
      hidden=jnp.zeros((rows, size, self.model.width), self.model.dtype),
      calls=jnp.int32(0),
    )
    required = self._required(valid, start, size)
    kept = self._read(length, params, tokens, valid, valid, required, kept)
    return self._logits(params, kept), kept

  def step(self, params, tokens, valid, start, size, carry):
    need = self.needed(tokens, valid, carry.read_tokens)
    calls = carry.calls + 1
    if self.refresh is not None:
      due = calls >= self.refresh
      need, calls = jnp.where(due, valid, need), jnp.where(due, 0, calls)
    kept = dataclasses.replace(carry, calls=calls)
    sizes = self._sizes(tokens.shape[1])
    most = need.sum(-1).max()
    # They descend: the last one that is enough.
    chosen = sum((most <= n).astype(jnp.int32) for n in sizes) - 1

    def of(n):
      return lambda *given: self._read(n, *given)

    kept = jax.lax.switch(
      chosen,
      [of(n) for n in sizes],
      params,
      tokens,
      valid,
      need,
      self._required(valid, start, size),
      kept,
    )
    return self._logits(params, kept), kept

  def needed(
    self,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    read_tokens: Int[Array, "B T"],
  ) -> Bool[Array, "B T"]:
    """Returns the places that a call reads, if not all.

    Args:
      tokens: now.
      valid: False for padding.
      read_tokens: what each place was when it was last read.
    """
    masked = (tokens == self.mask_id) & valid
    need = masked | (tokens != read_tokens)
    if self.shift:
      need |= jnp.pad(masked, ((0, 0), (0, 1)))[:, 1:]
    return need & valid

  def _sizes(self, length: int) -> list[int]:
    """Returns how many places a call may read, descending."""
    halvings = min(self.halvings, length.bit_length())
    return sorted(
      {-(-length // 2**i) for i in range(halvings + 1)}, reverse=True
    )

  def _read(
    self,
    n: int,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    need: Bool[Array, "B T"],
    required: Int[Array, "B K"],
    kept: DelayedCarry,
  ) -> DelayedCarry:
    """Returns what is known once the places in need, at most `n`, are read."""
    order = jnp.argsort(~need, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)

    def some(x, at):
      return jnp.take_along_axis(x, at, axis=-1)

    at = order[:, :n]
    place = jnp.where(some(need, at), some(positions(valid), at), -1)
    keep = jnp.minimum(some(rank, required), n - 1)
    hidden, cache = recompute(
      self, params, tokens, valid, some(tokens, at), place, kept.cache, keep
    )
    new = some(need, required)[..., None]
    return DelayedCarry(
      cache=cache,
      read_tokens=jnp.where(need, tokens, kept.read_tokens),
      hidden=jnp.where(new, hidden, kept.hidden),
      calls=kept.calls,
    )

  def _required(self, valid, start, size) -> Int[Array, "B K"]:
    return state_index(start, size, self.shift, positions(valid))

  def _logits(self, params, kept) -> Float[Array, "B K V"]:
    return self.model.apply({"params": params}, kept.hidden, method="logits")
