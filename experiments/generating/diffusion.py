"""What `generate --sampler=diffusion` does with a model and its prompts."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.generating import infilling
from experiments.generating.infilling import Text
from experiments.generating.prepared_rows import PreparedRows, batches, prepare
from experiments.generating.unmask_display import UnmaskDisplay, pieces_of
from research import progress
from research.diffusion.sampling import sampler, variable_length, visualize
from research.diffusion.sampling.classifier_free_guidance import with_prompt
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.make_denoiser import make_denoiser
from research.generation.sampling import Sampling
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
  """Files that show how a row was filled.

  Attributes:
    html: a page to write, or None.
    gif: a moving picture to write, or None.
  """

  html: str | None = None
  gif: str | None = None


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


def check_next_token(loaded: Loaded, what: str) -> None:
  """Raises UserError if a model does not predict the next token.

  One that was trained to fill in masks with both sides in sight gives a next
  token, too, which says nothing.
  """
  if not loaded.predicts_next_token:
    raise UserError(
      f"{what}: a masked diffusion model; expected one that predicts the next"
      " token.\nGenerate with --sampler=diffusion; for a bound on a text's"
      " likelihood, use research.interop.lm_eval.lm_eval_diffusion.rolling"
    )


def check(
  config: SamplerConfig, infills: Sequence[str], count: int, pictures: Pictures
) -> None:
  """Raises UserError for what a command cannot do, whatever the model is."""
  for text in infills:
    infilling.parsed(text)
  if infills and not config.stop_early:
    raise UserError(
      "--nostop_early: has no effect with --infill, which always fills all "
      "gaps; leave it out"
    )
  if infills and config.canvas is not None:
    raise UserError(
      f"--infill: fixes the length of each gap, and"
      f" --{config.show('canvas')} lets the model choose it; leave one out"
    )
  for name, file in dataclasses.asdict(pictures).items():
    if file is not None and count > 1:
      raise UserError(f"--{name}: found {count} prompts, expected one")


def fill(
  loaded: Loaded,
  spec: Spec,
  prompts: list[list[int]],
  rules: Sampling,
  config: SamplerConfig,
  seed: int = 0,
  texts: list[Text] | None = None,
  pictures: Pictures = Pictures(),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Fills rows after prompts; returns the report of each, and of all.

  Args:
    prompts: ids; rows of a batch do not depend on each other. With `texts`
      those, masks in their gaps.
    texts: where the gaps of each are, if gaps are filled.
    pictures: to be written, of a single row.

  Raises:
    UserError: it cannot be, or a file cannot be written.
  """
  rows: list[dict[str, Any]] = [{} for _ in prompts]
  tokens, after, seconds = 0, 0.0, 0.0
  todo, gaps = [], texts is not None
  for chosen in batches(prompts, spec, config, gaps):
    some = [prompts[i] for i in chosen]
    prepared = prepare(some, chosen, spec, config, seed, gaps)
    _check_context(loaded, some, prepared, gaps)
    todo.append((chosen, some, prepared))
  # Nothing is filled before all of them are found to be right.
  for chosen, some, prepared in todo:
    its = None if texts is None else [texts[i] for i in chosen]
    given = some, prepared, its, rules, config.length, pictures
    found, spent = _fill(loaded, spec, *given)
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


def _fill(loaded, spec, prompts, prepared, texts, rules, length, pictures):
  """Returns rows of one batch; tokens, their seconds, and all seconds.

  Tokens are those before an end and after the block that compiles. `length` is
  how many were asked for, of which whole blocks may be more.
  """
  config, params = prepared.config, loaded.params
  if config.guidance:
    params = with_prompt(params, jnp.asarray(prepared.prompt))
  denoiser = make_denoiser(config, loaded.model, spec.shift, spec.block)
  display = _display(loaded, spec, prepared, texts)
  begin = time.perf_counter()
  given, growing = (denoiser, params, prepared.state), config.canvas is not None
  lengths = [length] * len(prompts)
  with progress.phase("filling masks") as now:

    def on_block(state):
      if display.draws:  # what a line would tear apart
        now.what = None
      display(state)

    if growing:
      got = variable_length.sample(*given, config, rules, on_block)
      lengths = got.canvas.tolist()
    else:
      got = sampler.sample(*given, config, rules, on_block)
  seconds = time.perf_counter() - begin - display.seconds
  if len(prompts) == 1:
    print(flush=True)
    head, stop = prepared.heads[0], prepared.stops[0]
    span = prepared.starts[0], head + lengths[0] if growing else stop
    _draw(got, loaded, spec, pictures, *span)
  (first, ready), (last, _) = display.blocks[0], display.blocks[-1]
  if texts is not None:
    rows, early = _texts(loaded, prepared, got, texts, ready)
  else:
    early = ready
    rows = [
      _row(loaded, prepared, got, i, len(prompt), lengths[i])
      for i, prompt in enumerate(prompts)
    ]
  if growing:
    for row, length in zip(rows, lengths, strict=True):
      row["canvas"] = length
  late = [max(row["tokens"] - n, 0) for row, n in zip(rows, early, strict=True)]
  return rows, (sum(late), last - first, seconds)


def _display(loaded, spec, prepared, texts) -> UnmaskDisplay:
  """Returns what shows answers, or texts but what is behind ends in gaps."""
  if texts is None:
    return UnmaskDisplay(loaded.tokenizer, prepared.heads, spec.mask_id)
  first = [
    b + text.prompt for b, text in zip(prepared.starts, texts, strict=True)
  ]

  def kept(tokens):
    out = np.ones(len(tokens), bool)
    own = slice(prepared.starts[0], prepared.stops[0])
    out[own] = texts[0].kept(tokens[own], prepared.config.end)
    return out

  return UnmaskDisplay(loaded.tokenizer, first, spec.mask_id, kept)


def _check_context(
  loaded: Loaded, prompts: list[list[int]], prepared: PreparedRows, gaps: bool
) -> None:
  """Raises UserError if a row has more tokens than the model's context."""
  sizes = [
    stop - begin
    for begin, stop in zip(prepared.starts, prepared.stops, strict=True)
  ]
  total, most = max(sizes), loaded.model.max_positions
  if most is None or total <= most:
    return
  if gaps:
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


def _row(loaded, prepared, got, i, prompt, length) -> dict[str, Any]:
  made = got.tokens[i, prepared.heads[i] :][:length]
  ends = np.flatnonzero(np.isin(made, prepared.config.end))
  count = int(ends[0]) if ends.size else len(made)
  return {
    "text": loaded.tokenizer.decode(made[:count].tolist()),
    "tokens": count,
    "finish_reason": "stop" if ends.size else "length",
    "prompt_tokens": prompt,
    **_calls(got, i, count),
  }


def _texts(loaded, prepared, got, texts, ready):
  """Returns rows, and how many tokens of each the first block has filled.

  Args:
    ready: how many places that block has filled: the first ones of each row.
  """
  rows, early = [], []
  for i, text in enumerate(texts):
    tokens = got.tokens[i, prepared.starts[i] : prepared.stops[i]]
    kept = text.kept(tokens, prepared.config.end)
    places = np.concatenate([np.arange(*gap) for gap in text.gaps])
    early.append(int(kept[places[: ready[i]]].sum()))
    rows.append(_filled(loaded, text, tokens, kept))
    rows[-1] |= _calls(got, i, rows[-1]["tokens"])
  return rows, early


def _filled(loaded, text, tokens, kept) -> dict[str, Any]:
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


def _draw(got, loaded, spec, pictures, begin, end) -> None:
  """Writes the files that show how a row was filled, without its padding."""
  tokens, filled = got.tokens[0, begin:end], got.filled[0, begin:end]
  pieces = pieces_of(loaded.tokenizer, tokens, spec.mask_id)
  if pictures.html is not None:
    visualize.write_page(pictures.html, pieces, filled)
  if pictures.gif is not None:
    visualize.write_gif(pictures.gif, visualize.shown(pieces), filled)
