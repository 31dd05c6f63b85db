"""Rows that `generate --sampler=diffusion` fills, and how they begin."""

import dataclasses

import jax
import numpy as np

from experiments.generating.filling_wanted import (
  BLOCK,
  Wanted,
  growth_of,
  policy_of,
  remask_of,
)
from research.diffusion.sampling import canvas, layout, sampler
from research.diffusion.sampling.candidates import Options
from research.interop.diffusion.spec import Spec
from research.typing import Bool, UserError


@dataclasses.dataclass(frozen=True)
class Begun:
  """Rows before anything is filled.

  Attributes:
    state, options: for the sampler.
    begins: the index of each row's first token.
    heads: that of the first place to be filled.
    stops: where each row's text ends; one that grows has its longest here.
    prompt: `[B, T]`, what guidance masks.
  """

  state: sampler.State
  options: Options
  begins: list[int]
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
  prompts: list[list[int]], how: Spec, wanted: Wanted
) -> list[list[int]]:
  """Returns which prompts are filled together, by their numbers.

  All of them; but a number of steps is split among the blocks of a row that
  have masks, of which rows with gaps, or blocks that begin with the row, differ
  in number.
  """
  if wanted.steps is None:
    return [list(range(len(prompts)))]
  block, found = _block(how, wanted), {}
  for i, prompt in enumerate(prompts):
    count = _row(prompt, how, wanted, block).blocks
    found.setdefault(count, []).append(i)
  return list(found.values())


def begun(
  prompts: list[list[int]], examples: list[int], how: Spec, wanted: Wanted
) -> Begun:
  """Returns rows to be filled, and how.

  Blocks of a model that has some start at the row's start, so the end of the
  prompt may stand in the first one.

  Args:
    prompts: ids, of one of the `batches`; with `wanted.infill` whole texts,
      masks in their gaps.
    examples: their numbers, which their randomness comes from.
    how: what the checkpoint says.
    wanted: the flags.

  Raises:
    UserError: a prompt holds the mask, or blocks and steps do not divide.
  """
  if not wanted.infill:
    layout.check_prompts(prompts, how.mask_id)
  block = _block(how, wanted)
  rows = [_row(prompt, how, wanted, block) for prompt in prompts]
  options = _options(rows, block, how, wanted)
  ids, longest = [row.ids for row in rows], max(row.start for row in rows)
  unit = 1 if how.block is None else block
  width = layout.width(longest, options.length, unit)
  laid = layout.lay(ids, how.mask_id, options.length, width, unit)
  key, numbers = jax.random.key(wanted.seed), jax.numpy.array(examples)
  if wanted.guidance and not laid.prompt.any(-1).all():
    raise UserError(
      f"--guidance={wanted.guidance}: a text has nothing before its first gap, "
      "by which it would be guided; leave the flag out"
    )
  growth = growth_of(wanted)
  if growth is not None:
    state = canvas.start(prompts, options, growth, key, numbers, width)
  else:
    state = sampler.begin(laid.tokens, laid.masked, laid.valid, key, numbers)
  stops = [begin + len(it) for begin, it in zip(laid.begins, ids, strict=True)]
  return Begun(state, options, laid.begins, laid.heads, stops, laid.prompt)


def _block(how: Spec, wanted: Wanted) -> int:
  """Returns a block's tokens."""
  if growth_of(wanted) is not None and how.block is not None:
    raise UserError(
      f"--canvas={wanted.canvas}: the model's blocks see nothing after them "
      "and go on one by one until it ends; leave the flag out"
    )
  short = BLOCK if wanted.infill else min(BLOCK, wanted.length)
  block = wanted.block or how.block or short
  if how.block is not None and block != how.block:
    raise UserError(
      f"--block={block}: the model's blocks have {how.block} tokens; leave "
      "the flag out"
    )
  if how.block is None and not wanted.infill and wanted.length % block:
    raise UserError(
      f"--block={block}: does not divide --max_new_tokens={wanted.length}"
    )
  return block


def _row(prompt: list[int], how: Spec, wanted: Wanted, block: int) -> _Row:
  """Returns a prompt and masks, up to the end of a model's block, or a text."""
  ids, inside = prompt, 0
  if not wanted.infill:
    count = wanted.length
    if how.block is not None:
      count = layout.up(len(prompt) + count, block) - len(prompt)
    ids = [*prompt, *[how.mask_id] * count]
  head = layout.head(ids, how.mask_id)
  if how.block is not None:
    inside = head % block  # blocks start where the row does
  start = head - inside
  places = np.flatnonzero(np.array(ids) == how.mask_id) - start
  return _Row(ids, start, len(set((places // block).tolist())))


def _options(
  rows: list[_Row], block: int, how: Spec, wanted: Wanted
) -> Options:
  """Returns how rows are filled."""
  count = max(row.blocks for row in rows)
  longest = max(len(row.ids) - row.start for row in rows)
  length = layout.up(longest, block)
  steps = wanted.steps
  if steps is not None:
    if steps % count:
      raise UserError(
        f"--steps={steps}: expected a multiple of the {count} blocks of "
        f"{block} tokens"
      )
    steps = steps // count * (length // block)
  return Options(
    mask_id=how.mask_id,
    length=length,
    block=block,
    steps=steps,
    plan=wanted.plan,
    policy=policy_of(wanted.policy),
    select=wanted.select,
    place_temperature=wanted.place_temperature,
    tempered=wanted.tempered,
    remask=remask_of(wanted.remask),
    never_end=wanted.ends == "never",
    end_last=wanted.ends == "last",
    # A gap may end before the text does.
    stop=wanted.stop_early and not wanted.infill,
    edit=wanted.edit,
    edit_steps=wanted.edit_steps,
    end=tuple(i for i in how.end if i != how.mask_id),
  )
