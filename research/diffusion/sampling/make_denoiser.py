"""The denoiser that a sampler's settings ask for, around a model."""

import dataclasses

from research.diffusion import mask_ratio_time
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
)
from research.diffusion.sampling.config import (
  Delayed,
  Prefix,
  SamplerConfig,
  Vicinity,
)
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.policies import Credit
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.nn.transformer import Transformer
from research.typing import UserError


def make_denoiser(
  config: SamplerConfig,
  model: Transformer,
  shift: bool = False,
  block: int | None = None,
) -> Denoiser:
  """Returns what the sampler asks; with guidance it needs `with_prompt`.

  Args:
    config: a model's settings, see `SamplerConfig.for_model`.
    model: the Transformer.
    shift: see `denoiser.own_rows`.
    block: tokens of a block of a block-causal model.

  Raises:
    UserError: the cache is not one for the model.
  """
  denoiser = _cached(config, model, shift, block)
  if config.guidance:
    denoiser = ClassifierFreeGuidance(
      inner=denoiser, mask_id=config.mask_id, weight=config.guidance
    )
  if isinstance(config.policy, Credit):
    denoiser = Credited(
      inner=denoiser, mask_id=config.mask_id, credit=config.policy
    )
  return denoiser


def _cached(
  config: SamplerConfig, model: Transformer, shift: bool, block: int | None
) -> Denoiser:
  """Returns how rows are read, with or without a cache."""
  cache = config.cache
  common = dict(
    model=model,
    shift=shift,
    time=mask_ratio_time.for_model(model, config.mask_id),
  )
  if cache is None:
    return NoCache(**common, block=block)
  if block is not None:
    if isinstance(cache, Prefix):
      return BlockCausal(**common, block=block)
    raise UserError(
      f"{config.show('cache')}: the model is block-causal; expected prefix, "
      "which is exact, or none"
    )
  if isinstance(cache, Delayed):
    numbers = dataclasses.asdict(cache)
    return DelayedKVCache(**common, mask_id=config.mask_id, **numbers)
  if isinstance(cache, Vicinity):
    after = cache.before if cache.after is None else cache.after
    return BlockCache(**common, before=cache.before, after=after)
  # A canvas that grows is one block, and nothing is behind it.
  if isinstance(cache, Prefix) and config.canvas is None:
    return PrefixCache(**common)
  return BlockCache(**common)
