"""The denoiser of block-causal models: finished blocks are read once.

See `denoiser` for what a sampler asks of one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research.diffusion.mask_ratio_time import MaskRatioTime
from research.diffusion.sampling.denoiser import (
  Denoiser,
  cut,
  positions,
  shifted,
)
from research.nn import cache as caches
from research.nn.transformer import Transformer, init_cache
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCausal(Denoiser):
  """A block-causal model by its cache of finished blocks: exact.

  Keys and values of finished blocks come from a pass over their final tokens,
  as a whole row without a cache has them. Blocks start at index 0, so rows are
  padded on the left by whole blocks only.

  Attributes:
    model: the Transformer.
    block: tokens of a block.
    shift: see `own_rows`.
    time: by the masks of a row, for models that are conditioned on it; that of
      finished blocks is 0.
  """

  model: Transformer
  block: int
  shift: bool = False
  time: MaskRatioTime | None = None

  @property
  def unit(self) -> int:
    return self.block

  @property
  def caches_finished(self) -> bool:
    return True

  def cache_finished(self, params, tokens, valid, start, size, memory=None):
    """Returns what `step` needs of all that lies before a block.

    Args:
      params, tokens, valid, start, size: as for `prefill`.
      memory: what the last call of the block before has left, whose final
        tokens are all that is read now; None to read everything.
    """
    self._check(size)
    # The state before the block alone, which may predict its first token.
    rows, length = tokens.shape
    last = jnp.full((rows, 1), size - 1)
    if memory is not None:
      cache, _ = memory
      edge, cache = self._read(
        params, tokens, valid, start - size, size, cache, last
      )
      return cache, edge
    known = jnp.where(jnp.arange(length) < start, positions(valid), -1)
    cache = init_cache(self.model, params, rows, length, rings=False)
    segments = jnp.where(known >= 0, 0, -1)
    edge, cache = self.model.apply(
      {"params": params},
      tokens,
      known,
      Mask.block_causal(self.block, segments=segments),
      cache,
      time=self.time and jnp.zeros(rows),
      keep=jnp.full((rows, 1), jnp.maximum(start - 1, 0)),
    )
    return cache, edge

  def prefill(self, params, tokens, valid, start, size):
    """Reads all that lies before the block anew, whatever is cached."""
    memory = self.cache_finished(params, tokens, valid, start, size)
    return self.step(params, tokens, valid, start, size, memory)

  def step(self, params, tokens, valid, start, size, carry):
    cache, edge = carry
    hidden, cache = self._read(params, tokens, valid, start, size, cache)
    if self.shift:
      place = cut(positions(valid), start, size)
      hidden = shifted(hidden, edge, place)
    logits = self.model.apply({"params": params}, hidden, method="logits")
    return logits, (cache, edge)

  def _read(self, params, tokens, valid, start, size, cache, keep=None):
    """Returns a block's states, and the cache with its keys and values."""
    some, place = (cut(x, start, size) for x in (tokens, positions(valid)))
    before = valid & (jnp.arange(valid.shape[1]) < start)
    lengths = before.sum(-1, dtype=jnp.int32)
    cache = caches.Cache(lengths, cache.layers, fresh=False)
    time = self.time and self.time.rows(some, place >= 0)
    return self.model.apply(
      {"params": params}, some, place, Mask.full(), cache, time=time, keep=keep
    )

  @staticmethod
  def repeat_rows(memory, rows: int):
    """Returns what is cached of one row as that of equal rows."""
    cache, edge = memory

    def layers(x):
      return jnp.repeat(x, rows, axis=1)

    return caches.Cache(
      jnp.repeat(cache.length, rows),
      jax.tree.map(layers, cache.layers),
      cache.fresh,
    ), jnp.repeat(edge, rows, axis=0)

  def _check(self, size: int) -> None:
    if size != self.block:
      raise UserError(
        f"sampler: blocks of {size} tokens, but the model's have {self.block}"
      )
