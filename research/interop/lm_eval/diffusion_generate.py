"""The harness's `generate_until`, of models that fill in masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.classifier_free_guidance import with_prompt
from research.diffusion.sampling.config import Prefix, SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.interop.diffusion.spec import Spec
from research.interop.lm_eval import harness_requests as texts
from research.interop.lm_eval.lm_eval_settings import (
  DEFAULT,
  DiffusionEvalSettings,
  spec_of,
)
from research.interop.loaded import Loaded
from research.typing import UserError


def generate_until(
  loaded: Loaded,
  requests: Sequence[tuple[str, Mapping[str, Any]]],
  batch: int = 8,
  settings: DiffusionEvalSettings = DEFAULT,
) -> list[str]:
  """Returns continuations, cut before the first of some strings."""
  spec, out = spec_of(loaded), [""] * len(requests)
  for options, members in texts.grouped(requests).items():
    for start in range(0, len(members), batch):
      part = members[start : start + batch]
      contexts = [requests[i][0] for i in part]
      made = _filled(loaded, spec, contexts, options, part, settings)
      for i, text in zip(part, made, strict=True):
        out[i] = text
  return out


def _filled(loaded, spec, contexts, options, numbers, settings) -> list[str]:
  tokenizer = loaded.tokenizer
  count = settings.options.get("length", options.count)
  block = _block(spec, settings, count)
  room = _room(texts.context_of(loaded.model), count, block, spec)
  prompts = [
    tokenizer.special.truncate(tokenizer.prompt(text), room)
    or [texts.prefix(tokenizer)]
    for text in contexts
  ]
  laid, length = _laid(prompts, count, block, spec)
  config = _config(loaded, spec, settings, count, length, block)
  key, examples = jax.random.key(settings.seed), jnp.asarray(numbers)
  state = sampler.begin(laid.tokens, laid.masked, laid.valid, key, examples)
  denoiser = make_denoiser(config, loaded.model, spec.shift, spec.block)
  params = loaded.params
  if settings.guidance:
    params = with_prompt(params, jnp.asarray(laid.prompt))
  rows = sampler.sample(denoiser, params, state, config, options.rule)
  out = []
  for made, head in zip(rows.tokens, laid.heads, strict=True):
    made = made[head:][:count]
    if not config.stop_early:
      out.append(text_of(tokenizer, made.tolist(), options.until))
      continue
    stop = texts.stop_tokens(tokenizer, options.until)
    ends = np.flatnonzero(np.isin(made, (*config.end, *stop)))
    made = made[: ends[0]] if ends.size else made
    out.append(texts.before(tokenizer.decode(made.tolist()), options.until))
  return out


def text_of(tokenizer: Any, ids: list[int], until: Sequence[str]) -> str:
  """Returns the text of ids up to the first of some strings.

  They may be spelled-out special tokens, which the text then goes without: what
  LLaDA's harness makes of a canvas that is filled to its end.
  """
  whole = tokenizer.decode(ids, skip_special=False)
  cut = texts.before(whole, until)
  return tokenizer.decode(ids if cut == whole else tokenizer.encode(cut))


def _block(spec: Spec, settings: DiffusionEvalSettings, count: int) -> int:
  block = settings.options.get("block")
  if spec.block is None:
    return block or min(32, count)
  if block not in (None, spec.block):
    raise UserError(
      f"DiffusionEvalSettings.options: block is {block}, expected the model's,"
      f" {spec.block}"
    )
  return spec.block


def _room(context: int, count: int, block: int, spec: Spec) -> int:
  """Returns the tokens of a prompt that fit before `count` in whole blocks."""
  if spec.block is None:
    room = context - layout.round_up(count, block)
  else:
    room = context // block * block - count
  if room < 1:
    raise UserError(
      f"generation: length is {count} in blocks of {block}, expected less, so"
      f" that blocks and a prompt fit the model's context, {context}; set"
      " max_gen_toks, or length in DiffusionEvalSettings.options"
    )
  return room


def _config(
  loaded: Loaded,
  spec: Spec,
  settings: DiffusionEvalSettings,
  count: int,
  length: int,
  block: int,
) -> SamplerConfig:
  """Returns the sampler's settings for `length` places, `count` asked for."""
  ends = {*spec.end, *(loaded.tokenizer.stop or ())} - {spec.mask_id}
  given = {"end": tuple(sorted(ends)), **settings.options}
  steps, blocks = given.get("steps"), -(-count // block)
  if steps is not None:
    if steps % blocks:
      raise UserError(
        f"DiffusionEvalSettings.options: steps is {steps}, expected a multiple"
        f" of the {blocks} blocks of {block} tokens"
      )
    # A prompt that ends within a model's block may bring a block more.
    given["steps"] = steps // blocks * (length // block)
  given |= dict(length=length, block=block, guidance=settings.guidance)
  if spec.block is not None:
    if given.get("cache") is not None:
      raise UserError(
        "DiffusionEvalSettings.options: found a cache for a model with blocks,"
        " expected none: it has its own cache, which is exact"
      )
    given["cache"] = Prefix()
  return SamplerConfig(mask_id=spec.mask_id, **given)


def _laid(prompts, count, block, spec) -> tuple[layout.PaddedRows, int]:
  """Returns prompts and masks in a bucket, and how many places are filled."""
  layout.check_prompts(prompts, spec.mask_id)
  unit, rows, sizes = spec.block or 1, [], []
  for prompt in prompts:
    # Blocks of a model that has some begin where the row does.
    inside = len(prompt) % unit
    sizes.append(layout.round_up(inside + count, block))
    rows.append([*prompt, *[spec.mask_id] * (sizes[-1] - inside)])
  longest = max(len(prompt) // unit * unit for prompt in prompts)
  length = max(sizes)
  width = layout.width(longest, length, unit)
  return layout.pad_rows(rows, spec.mask_id, length, width, unit), length
