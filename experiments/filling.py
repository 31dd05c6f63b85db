"""What `generate --sampler=diffusion` does with a model and its prompts."""

import time
from typing import Any

import jax
import numpy as np

from experiments.filling_wanted import (
  BLOCK,
  Wanted,
  cache_of,
  growth_of,
  policy_of,
  remask_of,
)
from experiments.screen import Screen, pieces_of
from research.diffusion import canvas, sampler, view
from research.diffusion.candidates import Options
from research.diffusion.credit import Credited
from research.diffusion.delayed import Delayed
from research.diffusion.denoiser import BlockCausal, Cached, Denoiser, Whole
from research.diffusion.guided import Guided
from research.diffusion.policies import Policy
from research.diffusion.spec import Spec
from research.diffusion.told import shares
from research.interop.load import Loaded
from research.nn.sampling import Sampling
from research.typing import UserError


def spec_of(loaded: Loaded, name: str) -> Spec:
  """Returns how a model's masks are to be filled.

  Raises:
    UserError: it has none.
  """
  if loaded.diffusion is None:
    raise UserError(
      f"--model={name}: predicts the next token and has no mask; convert it, "
      f"then train it:\npython -m experiments.convert --from={name} --to=DIR "
      "--format=hf --mask_token=new\nOr leave --sampler=diffusion out."
    )
  return loaded.diffusion


def denoiser_of(
  loaded: Loaded, how: Spec, wanted: Wanted, prompt: int
) -> Denoiser:
  """Returns what the sampler asks.

  Args:
    loaded: the model.
    how: what its checkpoint says.
    wanted: the flags.
    prompt: tokens at the start of rows that are prompts, or padding.
  """
  asked = _reading(loaded, how, wanted)
  if wanted.guidance:
    asked = Guided(
      inner=asked, prompt=prompt, mask_id=how.mask_id, weight=wanted.guidance
    )
  if wanted.policy.startswith("credit"):
    asked = Credited(inner=asked, mask_id=how.mask_id)
  return asked


def _reading(loaded: Loaded, how: Spec, wanted: Wanted) -> Denoiser:
  """Returns how rows are read, with or without a cache."""
  common = dict(
    model=loaded.model,
    shift=how.shift,
    told=shares(loaded.model, how.mask_id),
  )
  kind, number = cache_of(wanted.cache)
  if kind == "none":
    return Whole(**common, block=how.block)
  if how.block is not None:
    if kind == "prefix":
      return BlockCausal(**common, block=how.block)
    raise UserError(
      f"--cache={wanted.cache}: the model's blocks see nothing after them; "
      "expected prefix, which is exact, or none"
    )
  if kind == "delayed":
    return Delayed(**common, mask_id=how.mask_id, refresh=number)
  # What is read again around a block: nothing, N tokens, or all behind it.
  before = after = number or 0
  if kind == "prefix":
    block = wanted.block or min(BLOCK, wanted.length)
    after = max(wanted.length - block, 0)
  return Cached(**common, before=before, after=after)


def batches(
  prompts: list[list[int]], how: Spec, wanted: Wanted
) -> list[list[int]]:
  """Returns which prompts are filled together, by their numbers.

  Rows of models without blocks are padded on the left. Blocks begin where rows
  do, so there the first block that is filled has to be the same one; with
  guidance, which masks prompts, their lengths have to be.
  """
  if how.block is None:
    return [list(range(len(prompts)))]
  size = 1 if wanted.guidance else wanted.block or how.block
  found: dict[int, list[int]] = {}
  for i, prompt in enumerate(prompts):
    found.setdefault(len(prompt) // size, []).append(i)
  return list(found.values())


def begun(
  prompts: list[list[int]],
  examples: list[int],
  how: Spec,
  policy: Policy,
  wanted: Wanted,
) -> tuple[sampler.State, Options, list[int]]:
  """Returns rows to be filled, how, and where each prompt ends.

  Blocks of a model that has some start at the row's start, so the end of the
  prompt may stand in the first one.

  Args:
    prompts: ids, of one of the `batches`.
    examples: their numbers, which their randomness comes from.
    how: what the checkpoint says.
    policy: of what is kept.
    wanted: the flags.

  Raises:
    UserError: a prompt holds the mask, or blocks and steps do not divide.
  """
  options = _options(prompts, how, policy, wanted)
  key, numbers = jax.random.key(wanted.seed), jax.numpy.array(examples)
  held = any(how.mask_id in prompt for prompt in prompts)
  growth = growth_of(wanted)
  if growth is not None:
    if how.block is not None:
      raise UserError(
        f"--canvas={wanted.canvas}: the model's blocks see nothing after them "
        "and go on one by one until it ends; leave the flag out"
      )
    state = canvas.start(prompts, options, growth, key, numbers)
    return state, options, [max(map(len, prompts))] * len(prompts)
  if how.block is None or held:
    # Says so, if a prompt holds the mask.
    state = sampler.start(prompts, options, key, numbers)
    return state, options, [max(map(len, prompts))] * len(prompts)
  first = len(prompts[0]) // options.block * options.block
  tokens = np.full((len(prompts), first + options.length), how.mask_id)
  ends = list(map(len, prompts))
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  masked = np.arange(tokens.shape[1]) >= np.array(ends)[:, None]
  valid = np.ones_like(masked)
  return sampler.begin(tokens, masked, valid, key, numbers), options, ends


def _options(
  prompts: list[list[int]], how: Spec, policy: Policy, wanted: Wanted
) -> Options:
  block = wanted.block or how.block or min(BLOCK, wanted.length)
  length = wanted.length
  if how.block is not None and block != how.block:
    raise UserError(
      f"--block={block}: the model's blocks have {how.block} tokens; leave "
      "the flag out"
    )
  if how.block is not None:
    inside = max(len(prompt) % block for prompt in prompts)
    length = -(-(inside + length) // block) * block
  elif length % block:
    raise UserError(
      f"--block={block}: does not divide --max_new_tokens={length}"
    )
  if wanted.steps is not None and wanted.steps % (length // block):
    raise UserError(
      f"--steps={wanted.steps}: expected a multiple of the {length // block} "
      f"blocks of {block} tokens"
    )
  return Options(
    mask_id=how.mask_id,
    length=length,
    block=block,
    steps=wanted.steps,
    plan=wanted.plan,
    policy=policy,
    select=wanted.select,
    remask=remask_of(wanted.remask),
    never_end=wanted.ends == "never",
    end_last=wanted.ends == "last",
    edit=wanted.edit,
    end=tuple(i for i in how.end if i != how.mask_id),
  )


def fill(
  loaded: Loaded,
  how: Spec,
  prompts: list[list[int]],
  rules: Sampling,
  wanted: Wanted,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Fills rows after prompts; returns what is told of each, and of all.

  Args:
    loaded: the model.
    how: what its checkpoint says.
    prompts: ids; rows of a batch do not depend on each other.
    rules: how candidates are drawn.
    wanted: the flags.

  Raises:
    UserError: it cannot be, or a file cannot be written.
  """
  rows: list[dict[str, Any]] = [{} for _ in prompts]
  tokens, after, seconds = 0, 0.0, 0.0
  for chosen in batches(prompts, how, wanted):
    some = [prompts[i] for i in chosen]
    found, spent = _fill(loaded, how, some, chosen, rules, wanted)
    for i, row in zip(chosen, found, strict=True):
      rows[i] = row
    tokens, after = tokens + spent[0], after + spent[1]
    seconds += spent[2]
  shared = {
    "tokens": sum(row["tokens"] for row in rows),
    "tokens_per_s": tokens / after if after else None,
    "seconds": seconds,
  }
  return rows, shared


def _fill(loaded, how, prompts, examples, rules, wanted):
  """Returns rows of one batch; tokens, their seconds, and all seconds.

  Tokens are those before an end and after the block that compiles.
  """
  policy = policy_of(wanted.policy)
  state, options, ends = begun(prompts, examples, how, policy, wanted)
  total, most = state.tokens.shape[1], loaded.model.max_positions
  if most is not None and total > most:
    longest = max(map(len, prompts))
    raise UserError(
      f"--prompt: {longest} tokens and {total - longest} new ones are "
      f"{total}, more than the model's context of {most}; shorten it, or lower "
      "--max_new_tokens"
    )
  asked = denoiser_of(loaded, how, wanted, ends[0])
  screen = Screen(loaded.tokenizer, ends, how.mask_id)
  begin = time.perf_counter()
  growth, given = growth_of(wanted), (asked, loaded.params, state, options)
  lengths = [wanted.length] * len(prompts)
  if growth is None:
    got = sampler.sample(*given, rules, screen)
  else:
    got = canvas.sample(*given, growth, rules, screen)
    lengths = got.canvas.tolist()
  seconds = time.perf_counter() - begin - screen.seconds
  if len(prompts) == 1:
    print(flush=True)
    _draw(got, loaded, how, wanted)
  rows = [
    _row(loaded, options, got, i, end, len(prompt), length)
    for i, (end, prompt, length) in enumerate(
      zip(ends, prompts, lengths, strict=True)
    )
  ]
  if growth is not None:
    for row, length in zip(rows, lengths, strict=True):
      row["canvas"] = length
  (first, ready), (last, _) = screen.blocks[0], screen.blocks[-1]
  late = [max(row["tokens"] - n, 0) for row, n in zip(rows, ready, strict=True)]
  return rows, (sum(late), last - first, seconds)


def _row(loaded, options, got, i, end, prompt, length) -> dict[str, Any]:
  """Returns what is told of one row, whose prompt ends at `end`."""
  made = got.tokens[i, end:][:length]
  ends = np.flatnonzero(np.isin(made, options.end))
  count = int(ends[0]) if ends.size else len(made)
  calls = int(got.counts[i])
  return {
    "text": loaded.tokenizer.decode(made[:count].tolist()),
    "tokens": count,
    "finish_reason": "stop" if ends.size else "length",
    "prompt_tokens": prompt,
    "calls": calls,
    "tokens_per_call": count / max(calls, 1),
  }


def _draw(got, loaded, how, wanted) -> None:
  """Writes the files that show how a row was filled."""
  tokens, filled = got.tokens[0], got.filled[0]
  if isinstance(got, canvas.Grown):
    own = len(tokens) - wanted.length + got.canvas[0]
    tokens, filled = tokens[:own], filled[:own]
  pieces = pieces_of(loaded.tokenizer, tokens, how.mask_id)
  if wanted.html is not None:
    view.write_page(wanted.html, pieces, filled)
  if wanted.gif is not None:
    view.write_gif(wanted.gif, view.shown(pieces), filled)
