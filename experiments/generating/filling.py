"""What `generate --sampler=diffusion` does with a model and its prompts."""

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.generating.filling_gaps import Text
from experiments.generating.filling_rows import Begun, batches, begun
from experiments.generating.filling_wanted import (
  Wanted,
  cache_of,
  credit_of,
  growth_of,
)
from experiments.generating.screen import Screen, pieces_of
from research.diffusion.sampling import canvas, sampler, view
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed import Delayed
from research.diffusion.sampling.denoiser import Cached, Denoiser, Whole
from research.diffusion.sampling.guided import Guided, with_prompt
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.diffusion.told import shares
from research.generation.sampling import Sampling
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
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


def denoiser_of(loaded: Loaded, how: Spec, wanted: Wanted) -> Denoiser:
  """Returns what the sampler asks; with guidance it needs `with_prompt`.

  Args:
    loaded: the model.
    how: what its checkpoint says.
    wanted: the flags.
  """
  asked = _reading(loaded, how, wanted)
  if wanted.guidance:
    asked = Guided(inner=asked, mask_id=how.mask_id, weight=wanted.guidance)
  credit = credit_of(wanted.policy)
  if credit is not None:
    asked = Credited(inner=asked, mask_id=how.mask_id, **credit)
  return asked


def _reading(loaded: Loaded, how: Spec, wanted: Wanted) -> Denoiser:
  """Returns how rows are read, with or without a cache."""
  common = dict(
    model=loaded.model,
    shift=how.shift,
    told=shares(loaded.model, how.mask_id),
  )
  kind, numbers = cache_of(wanted.cache)
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
    return Delayed(**common, mask_id=how.mask_id, **numbers)
  # A canvas that grows is one block, and nothing is behind it.
  if kind == "prefix" and growth_of(wanted) is None:
    return PrefixCache(**common)
  return Cached(**common, **numbers)


def fill(
  loaded: Loaded,
  how: Spec,
  prompts: list[list[int]],
  rules: Sampling,
  wanted: Wanted,
  texts: list[Text] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Fills rows after prompts; returns what is told of each, and of all.

  Args:
    loaded: the model.
    how: what its checkpoint says.
    prompts: ids; rows of a batch do not depend on each other. With
      `wanted.infill` whole texts, masks in their gaps.
    rules: how candidates are drawn.
    wanted: the flags.
    texts: where the gaps of each are; their ids are the prompts.

  Raises:
    UserError: it cannot be, or a file cannot be written.
  """
  rows: list[dict[str, Any]] = [{} for _ in prompts]
  tokens, after, seconds = 0, 0.0, 0.0
  todo = []
  for chosen in batches(prompts, how, wanted):
    some = [prompts[i] for i in chosen]
    it = begun(some, chosen, how, wanted)
    _check_context(loaded, some, it, wanted)
    todo.append((chosen, some, it))
  # Nothing is filled before all of them are found to be right.
  for chosen, some, it in todo:
    gaps = None if texts is None else [texts[i] for i in chosen]
    found, spent = _fill(loaded, how, some, it, gaps, rules, wanted)
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


def _fill(loaded, how, prompts, it, texts, rules, wanted):
  """Returns rows of one batch; tokens, their seconds, and all seconds.

  Tokens are those before an end and after the block that compiles.
  """
  params = loaded.params
  if wanted.guidance:
    params = with_prompt(params, jnp.asarray(it.prompt))
  asked = denoiser_of(loaded, how, wanted)
  screen = _screen(loaded, how, it, texts)
  begin = time.perf_counter()
  growth, given = growth_of(wanted), (asked, params, it.state, it.options)
  lengths = [wanted.length] * len(prompts)
  if growth is None:
    got = sampler.sample(*given, rules, screen)
  else:
    got = canvas.sample(*given, growth, rules, screen)
    lengths = got.canvas.tolist()
  seconds = time.perf_counter() - begin - screen.seconds
  if len(prompts) == 1:
    print(flush=True)
    last = it.heads[0] + lengths[0] if growth is not None else it.stops[0]
    _draw(got, loaded, how, wanted, it.begins[0], last)
  (first, ready), (last, _) = screen.blocks[0], screen.blocks[-1]
  if texts is not None:
    rows, early = _texts(loaded, it, got, texts, ready)
  else:
    early = ready
    rows = [
      _row(loaded, it, got, i, len(prompt), lengths[i])
      for i, prompt in enumerate(prompts)
    ]
  if growth is not None:
    for row, length in zip(rows, lengths, strict=True):
      row["canvas"] = length
  late = [max(row["tokens"] - n, 0) for row, n in zip(rows, early, strict=True)]
  return rows, (sum(late), last - first, seconds)


def _screen(loaded, how, it, texts) -> Screen:
  """Returns what shows answers, or texts but what is behind ends in gaps."""
  if texts is None:
    return Screen(loaded.tokenizer, it.heads, how.mask_id)
  first = [b + text.prompt for b, text in zip(it.begins, texts, strict=True)]

  def kept(tokens):
    out = np.ones(len(tokens), bool)
    own = slice(it.begins[0], it.stops[0])
    out[own] = texts[0].kept(tokens[own], it.options.end)
    return out

  return Screen(loaded.tokenizer, first, how.mask_id, kept)


def _check_context(
  loaded: Loaded, prompts: list[list[int]], it: Begun, wanted: Wanted
) -> None:
  """Raises UserError if a row has more tokens than the model's context."""
  sizes = [
    stop - begin for begin, stop in zip(it.begins, it.stops, strict=True)
  ]
  total, most = max(sizes), loaded.model.max_positions
  if most is None or total <= most:
    return
  if wanted.infill:
    raise UserError(
      f"--infill: a text of {total} tokens, gaps and its prompt included, is "
      f"more than the model's context of {most}; shorten it"
    )
  longest = len(prompts[sizes.index(total)])
  raise UserError(
    f"--prompt: {longest} tokens and {total - longest} new ones are "
    f"{total}, more than the model's context of {most}; shorten it, or lower "
    "--max_new_tokens"
  )


def _row(loaded, it, got, i, prompt, length) -> dict[str, Any]:
  """Returns what is told of one row."""
  made = got.tokens[i, it.heads[i] :][:length]
  ends = np.flatnonzero(np.isin(made, it.options.end))
  count = int(ends[0]) if ends.size else len(made)
  return {
    "text": loaded.tokenizer.decode(made[:count].tolist()),
    "tokens": count,
    "finish_reason": "stop" if ends.size else "length",
    "prompt_tokens": prompt,
    **_calls(got, i, count),
  }


def _texts(loaded, it, got, texts, ready):
  """Returns rows, and how many tokens of each the first block has filled.

  Args:
    loaded, it, got, texts: of a batch.
    ready: how many places that block has filled: the first ones of each row.
  """
  rows, early = [], []
  for i, text in enumerate(texts):
    tokens = got.tokens[i, it.begins[i] : it.stops[i]]
    kept = text.kept(tokens, it.options.end)
    places = np.concatenate([np.arange(*gap) for gap in text.gaps])
    early.append(int(kept[places[: ready[i]]].sum()))
    rows.append(_filled(loaded, text, tokens, kept))
    rows[-1] |= _calls(got, i, rows[-1]["tokens"])
  return rows, early


def _filled(loaded, text, tokens, kept) -> dict[str, Any]:
  """Returns what is told of one text with gaps."""
  decode = loaded.tokenizer.decode
  gaps = [tokens[slice(*gap)][kept[slice(*gap)]] for gap in text.gaps]
  given = len(text.ids) - sum(stop - start for start, stop in text.gaps)
  own = tokens[text.prompt :][kept[text.prompt :]]
  return {
    "text": decode(own.tolist()),
    "gaps": [decode(gap.tolist()) for gap in gaps],
    "tokens": sum(map(len, gaps)),
    "finish_reason": "filled",
    "prompt_tokens": given,
  }


def _calls(got, i, count) -> dict[str, Any]:
  calls = int(got.counts[i])
  return {"calls": calls, "tokens_per_call": count / max(calls, 1)}


def _draw(got, loaded, how, wanted, begin, end) -> None:
  """Writes the files that show how a row was filled, without its padding."""
  tokens, filled = got.tokens[0, begin:end], got.filled[0, begin:end]
  pieces = pieces_of(loaded.tokenizer, tokens, how.mask_id)
  if wanted.html is not None:
    view.write_page(wanted.html, pieces, filled)
  if wanted.gif is not None:
    view.write_gif(wanted.gif, view.shown(pieces), filled)
