"""Rows of a diffusion policy between two blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.diffusion import process
from research.diffusion.sampling import sampler
from research.generation import decoding
from research.nn.cache import put_rows, take_rows
from research.typing import Array, Bool, Float, Int, Params

_REDRAWN = 2**30
"""Branches from here on draw blocks again; below are those of searches."""


@dataclasses.dataclass(frozen=True)
class BlockRows:
  """Rows between two blocks; arrays are `[R]`.

  Attributes:
    rows: tokens and masks, on the device.
    first: where the first block begins.
    at: where each row's next block begins.
    cached: whether the cache has all that stands before that.
    memory: the cache of finished blocks, or None.
    prompt: which prompt each row continues.
    row_params: parameters whose row i reads prompt i, such as those with its
      image; None where all rows have the same.
  """

  rows: sampler.State
  first: int
  at: Int[np.ndarray, " R"]
  cached: Bool[np.ndarray, " R"]
  memory: Any
  prompt: Int[np.ndarray, " R"]
  row_params: Params | None = None

  def params(self, common: Params) -> Params:
    """Returns the parameters that read these rows, of the common ones."""
    if self.row_params is None:
      return common
    return weights.take_rows(
      self.row_params, jnp.asarray(self.prompt, jnp.int32)
    )

  def select(
    self, rows: Int[np.ndarray, " N"], branch: Int[np.ndarray, " N"]
  ) -> "BlockRows":
    """Returns a copy of chosen rows; see `decoding.select`."""
    return BlockRows(
      rows=_forked(self.rows, rows, branch),
      first=self.first,
      at=self.at[rows],
      cached=self.cached[rows],
      memory=copied(self.memory, rows),
      prompt=self.prompt[rows],
      row_params=self.row_params,
    )

  def store(self, new: "BlockRows", rows: Int[np.ndarray, " N"]) -> "BlockRows":
    """Returns these rows with those of `new` in place of some.

    Args:
      new: N rows of the same prompts.
      rows: where each goes; the number of these rows, or more: nowhere.
    """
    inside = rows < len(self.at)
    at, cached = self.at.copy(), self.cached.copy()
    prompt = self.prompt.copy()
    at[rows[inside]] = new.at[inside]
    cached[rows[inside]] = new.cached[inside]
    prompt[rows[inside]] = new.prompt[inside]
    return BlockRows(
      rows=_put(self.rows, new.rows, rows),
      first=self.first,
      at=at,
      cached=cached,
      memory=merged(self.memory, new.memory, rows),
      prompt=prompt,
      row_params=self.row_params,
    )

  def masked_again(
    self,
    which: Bool[np.ndarray, " R"],
    share: float | int,
    mask: int,
    size: int,
    ends: Int[np.ndarray, " E"],
    draw: int,
  ) -> "BlockRows":
    """Returns a copy in which some rows have their last block masked again.

    Args:
      which: rows whose last block is finished.
      share: share of the tokens up to the block's first end, the least likely
        ones.
      size: places of a block.
      ends: tokens that end a text.
      draw: which of the row's next draws of the block this is, from 0.
    """
    every = np.arange(len(which), dtype=np.int32)
    branch = np.where(which, _REDRAWN + draw, 0).astype(np.int32)
    copy = self.select(every, branch)
    at = np.where(which, self.at - size, self.at)
    rows = _masked_again(
      *(copy.rows, at, which, np.float32(share), ends), mask=mask, size=size
    )
    # Nothing before the block has changed since it was filled.
    cached = which | self.cached
    return dataclasses.replace(copy, rows=rows, at=at, cached=cached)


def _each(f: Any, *states: sampler.State) -> sampler.State:
  """Returns rows, each of whose arrays `f` makes of those of others."""
  first, *rest = (dataclasses.replace(x, calls=None) for x in states)
  calls = functools.reduce(jnp.maximum, (x.calls for x in states))
  return dataclasses.replace(jax.tree.map(f, first, *rest), calls=calls)


@jax.jit
def _forked(
  state: sampler.State, rows: Int[Array, " N"], branch: Int[Array, " N"]
) -> sampler.State:
  """Returns chosen rows with the keys of their branches."""
  chosen = _each(lambda x: x[rows], state)
  keys = decoding.branch_keys(chosen.keys, chosen.count, branch)
  return dataclasses.replace(chosen, keys=keys)


@jax.jit
def _put(
  state: sampler.State, new: sampler.State, rows: Int[Array, " N"]
) -> sampler.State:
  """Returns rows, some of which are those of `new`; past the end: nowhere."""
  return _each(lambda x, y: x.at[rows].set(y, mode="drop"), state, new)


@jax.jit
def copied(memory: Any, rows: Int[Array, " N"]) -> Any:
  """Returns a copy of what is cached of chosen rows."""
  if memory is None:
    return None
  cache, edge = memory
  return take_rows(cache, rows), edge[rows]


@functools.partial(jax.jit, donate_argnames=("memory",))
def merged(memory: Any, new: Any, rows: Int[Array, " N"]) -> Any:
  """Returns what is cached, some rows of which are those of `new`."""
  if memory is None:
    return None
  (cache, edge), (other, last) = memory, new
  edge = edge.at[rows].set(last, mode="drop")
  return put_rows(cache, other, rows), edge


@functools.partial(jax.jit, static_argnames=("mask", "size"))
def _masked_again(
  state: sampler.State,
  at: Int[Array, " R"],
  which: Bool[Array, " R"],
  share: Float[Array, ""],
  stop: Int[Array, " E"],
  mask: int,
  size: int,
) -> sampler.State:
  """Returns rows with the least sure places of a block masked again."""
  place = jnp.arange(state.tokens.shape[1])
  candidates = (
    ~state.fixed & state.valid & (place >= at[:, None]) & which[:, None]
  )
  block = candidates & (place < at[:, None] + size)
  ends = block & jnp.isin(state.tokens, stop)
  drawn = block & (jnp.cumsum(ends, axis=1) - ends == 0)
  rank = process.ranks(jnp.where(drawn, state.confidence, jnp.inf))
  # A product may be rounded up: 0.6 of 25 are 15.000001 in float32.
  count = jnp.ceil(share * drawn.sum(axis=1, keepdims=True) * (1 - 1e-6))
  again = candidates & ~(drawn & (rank >= count))
  return dataclasses.replace(
    state,
    tokens=jnp.where(again, mask, state.tokens),
    masked=state.masked | again,
    done=state.done & ~which,
    filled=jnp.where(again, -1, state.filled),
    confidence=jnp.where(again, 1.0, state.confidence),
  )
