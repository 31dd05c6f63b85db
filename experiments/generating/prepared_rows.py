"""Rows that `generate --sampler=diffusion` fills, and how they begin."""

import dataclasses

import jax
import numpy as np

from research.diffusion.sampling import layout, sampler, variable_length
from research.diffusion.sampling.config import BLOCK, SamplerConfig
from research.interop.diffusion.spec import Spec
from research.typing import Bool, UserError


@dataclasses.dataclass(frozen=True)
class PreparedRows:
  """Rows before anything is filled.

  Attributes:
    state, config: for the sampler.
    starts: the index of each row's first token.
    heads: that of the first place to be filled.
    stops: where each row's text ends; one that grows has its longest here.
    prompt: `[B, T]`, what guidance masks.
  """

  state: sampler.State
  config: SamplerConfig
  starts: list[int]
  heads: list[int]
  stops: list[int]
  prompt: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row before it is laid.

  Attributes:
    ids: with masks.
    start: where its first block with a mask begins.
    blocks: how many have masks.
  """

  ids: list[int]
  start: int
  blocks: int


def batches(
  prompts: list[list[int]], spec: Spec, config: SamplerConfig, gaps: bool
) -> list[list[int]]:
  """Returns which prompts are filled together, by their numbers.

  All of them; but a number of steps is split among the blocks of a row that
  have masks, of which rows with gaps, or blocks that begin with the row, differ
  in number.

  Args:
    prompts: ids; with `gaps` whole texts, masks in their gaps.
    gaps: whether gaps are filled, not answers.
  """
  if config.steps is None:
    return [list(range(len(prompts)))]
  block, found = _block(spec, config, gaps), {}
  for i, prompt in enumerate(prompts):
    count = _row(prompt, spec, config, block, gaps).blocks
    found.setdefault(count, []).append(i)
  return list(found.values())


def prepare(
  prompts: list[list[int]],
  examples: list[int],
  spec: Spec,
  config: SamplerConfig,
  seed: int = 0,
  gaps: bool = False,
) -> PreparedRows:
  """Returns rows to be filled, and how.

  Blocks of a model that has some start at the row's start, so the end of the
  prompt may stand in the first one.

  Args:
    prompts: ids, of one of the `batches`; with `gaps` whole texts, masks in
      their gaps.
    examples: their numbers, which their randomness comes from.

  Raises:
    UserError: a prompt holds the mask, or blocks and steps do not divide.
  """
  if not gaps:
    layout.check_prompts(prompts, spec.mask_id)
  block = _block(spec, config, gaps)
  rows = [_row(prompt, spec, config, block, gaps) for prompt in prompts]
  config = _of_rows(rows, block, spec, config, gaps)
  ids, longest = [row.ids for row in rows], max(row.start for row in rows)
  unit = 1 if spec.block is None else block
  width = layout.width(longest, config.length, unit)
  laid = layout.pad_rows(ids, spec.mask_id, config.length, width, unit)
  key, numbers = jax.random.key(seed), jax.numpy.array(examples)
  if config.guidance and not laid.prompt.any(-1).all():
    raise UserError(
      f"{config.show('guidance')}: classifier-free guidance needs a prompt, "
      "found a text that begins with its first gap; leave it out"
    )
  if config.canvas is not None:
    state = variable_length.start(prompts, config, key, numbers, width)
  else:
    state = sampler.begin(laid.tokens, laid.masked, laid.valid, key, numbers)
  stops = [begin + len(it) for begin, it in zip(laid.starts, ids, strict=True)]
  return PreparedRows(
    state, config, laid.starts, laid.heads, stops, laid.prompt
  )


def _block(spec: Spec, config: SamplerConfig, gaps: bool) -> int:
  if config.canvas is not None and spec.block is not None:
    raise UserError(
      f"{config.show('canvas')}: this model is block-causal, and adds blocks "
      "until the text ends anyway; leave it out"
    )
  short = BLOCK if gaps else min(BLOCK, config.length)
  block = config.block or spec.block or short
  if spec.block is not None and block != spec.block:
    raise UserError(
      f"block={block}: the model's blocks have {spec.block} tokens; leave it "
      "out"
    )
  if spec.block is None and not gaps and config.length % block:
    raise UserError(f"block={block}: does not divide {config.show('length')}")
  return block


def _row(
  prompt: list[int], spec: Spec, config: SamplerConfig, block: int, gaps: bool
) -> _Row:
  """Returns a prompt and masks, up to the end of a model's block, or a text."""
  ids, inside = prompt, 0
  if not gaps:
    count = config.length
    if spec.block is not None:
      count = layout.round_up(len(prompt) + count, block) - len(prompt)
    ids = [*prompt, *[spec.mask_id] * count]
  head = layout.first_mask(ids, spec.mask_id)
  if spec.block is not None:
    inside = head % block  # blocks start where the row does
  start = head - inside
  places = np.flatnonzero(np.array(ids) == spec.mask_id) - start
  return _Row(ids, start, len(set((places // block).tolist())))


def _of_rows(
  rows: list[_Row],
  block: int,
  spec: Spec,
  config: SamplerConfig,
  gaps: bool,
) -> SamplerConfig:
  """Returns the settings as a model's rows need them."""
  count = max(row.blocks for row in rows)
  longest = max(len(row.ids) - row.start for row in rows)
  length, steps = layout.round_up(longest, block), config.steps
  if steps is not None:
    if steps % count:
      raise UserError(
        f"steps={steps}: expected a multiple of the {count} blocks of "
        f"{block} tokens"
      )
    steps = steps // count * (length // block)
  return config.for_model(
    spec.mask_id,
    [i for i in spec.end if i != spec.mask_id],
    length=length,
    block=block,
    steps=steps,
    # A gap may end before the text does.
    stop_early=config.stop_early and not gaps,
  )
