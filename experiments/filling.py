"""What `generate --sampler=diffusion` does with a model, a prompt at a time."""

import dataclasses
import math
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np

from research.diffusion import sampler, view
from research.diffusion.candidates import Options
from research.diffusion.denoiser import BlockCausal, Cached, Denoiser, Whole
from research.diffusion.guided import Guided
from research.diffusion.policies import Factor, Policy, Quota, Threshold
from research.diffusion.spec import Spec
from research.interop.load import Loaded
from research.nn.sampling import Sampling
from research.typing import UserError

BLOCK = 32
FRAME = 0.03
"""Seconds that a terminal shows a frame for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What the flags say, under their names; see `experiments.generate`."""

  length: int = 128
  block: int | None = None
  steps: int | None = None
  policy: str = "quota"
  cache: str = "none"
  guidance: float = 0.0
  seed: int = 0
  gif: str | None = None
  html: str | None = None

  def check(self, prompts: int) -> None:
    """Raises UserError for what is wrong whatever the model is.

    Args:
      prompts: how many there are.
    """
    if self.length < 1:
      raise UserError(
        f"--max_new_tokens: found {self.length}, expected at least 1"
      )
    policy_of(self.policy)
    cached = around(self.cache, self.length) is not None
    if self.guidance and cached:
      raise UserError(
        f"--guidance={self.guidance}: reads whole rows without the prompt; "
        "expected --cache=none"
      )
    if self.steps is not None and self.policy != "quota":
      raise UserError(
        f"--steps={self.steps}: --policy={self.policy} needs as many calls as "
        "it takes; expected --policy=quota, or no --steps"
      )
    for name, file in (("gif", self.gif), ("html", self.html)):
      if file is not None and prompts > 1:
        raise UserError(f"--{name}: shows one prompt, found {prompts}")


def policy_of(text: str) -> Policy:
  """Returns what `quota`, `threshold:0.9` or `factor:1` stands for."""
  name, colon, number = text.partition(":")
  value = _number(number) if colon else None
  if text == "quota":
    return Quota()
  if name == "threshold" and value is not None and 0 < value <= 1:
    return Threshold(threshold=value)
  if name == "factor" and value is not None and value > 0:
    return Factor(factor=value)
  raise UserError(
    f"--policy={text}: expected quota, threshold:P with P in (0, 1], or "
    "factor:F with F above 0"
  )


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def around(text: str, length: int) -> tuple[int, int] | None:
  """Returns how many tokens around a block are read anew, or None for all.

  Args:
    text: `none`, `prefix`, `dual` or `vicinity:N`.
    length: tokens that are generated.
  """
  name, _, number = text.partition(":")
  if text == "none":
    return None
  if text in ("prefix", "dual"):
    return 0, (length if text == "prefix" else 0)
  if name == "vicinity" and number.isdecimal() and len(number) < 7:
    return int(number), int(number)
  raise UserError(f"--cache={text}: expected none, prefix, dual or vicinity:N")


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
    prompt: tokens of it.
  """
  model, shift = loaded.model, how.shift
  near = around(wanted.cache, wanted.length)
  if how.block is not None and near is not None:
    if wanted.cache != "prefix":
      raise UserError(
        f"--cache={wanted.cache}: the model's blocks see nothing after them; "
        "expected prefix, which is exact, or none"
      )
    return BlockCausal(model=model, block=how.block, shift=shift)
  if near is not None:
    before, after = near
    return Cached(model=model, shift=shift, before=before, after=after)
  whole = Whole(model=model, shift=shift, block=how.block)
  if not wanted.guidance:
    return whole
  return Guided(
    inner=whole, prompt=prompt, mask_id=how.mask_id, weight=wanted.guidance
  )


def begun(
  prompt: list[int], index: int, how: Spec, policy: Policy, wanted: Wanted
) -> tuple[sampler.State, Options]:
  """Returns a row to be filled, and how.

  Blocks of a model that has some start at the row's start, so the end of the
  prompt may stand in the first one.

  Args:
    prompt: ids.
    index: its number, which its randomness comes from.
    how: what the checkpoint says.
    policy: of what is kept.
    wanted: the flags.

  Raises:
    UserError: the prompt holds the mask, or blocks and steps do not divide.
  """
  block = wanted.block or how.block or min(BLOCK, wanted.length)
  if how.block is not None and block != how.block:
    raise UserError(
      f"--block={block}: the model's blocks have {how.block} tokens; leave "
      "the flag out"
    )
  inside = 0 if how.block is None else len(prompt) % block
  length = wanted.length
  if how.block is not None:
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
  options = Options(
    mask_id=how.mask_id,
    length=length,
    block=block,
    steps=wanted.steps,
    policy=policy,
    end=tuple(i for i in how.end if i != how.mask_id),
  )
  key = jax.random.key(wanted.seed)
  example = jax.numpy.array([index])
  if not inside:
    return sampler.start([prompt], options, key, example), options
  if how.mask_id in prompt:
    sampler.start([prompt], options, key)  # says so
  first = len(prompt) - inside
  tokens = np.full((1, first + length), how.mask_id)
  tokens[0, : len(prompt)] = prompt
  masked = np.arange(first + length)[None] >= len(prompt)
  valid = np.ones_like(masked)
  return sampler.begin(tokens, masked, valid, key, example), options


class _Screen:
  """Shows a row as its blocks are filled; on a terminal call by call."""

  def __init__(self, tokenizer: Any, prompt: int, mask_id: int):
    self._tokenizer, self._prompt, self._mask = tokenizer, prompt, mask_id
    self._tty = sys.stdout.isatty()
    self._columns = shutil.get_terminal_size().columns
    self._above, self._last, self._written = 0, -1, 0
    self.seconds = 0.0
    self.blocks: list[tuple[float, int]] = []

  def __call__(self, state: sampler.State) -> None:
    jax.block_until_ready(state)
    begin = time.perf_counter()
    filled = np.asarray(state.filled)[0, self._prompt :]
    tokens = np.asarray(state.tokens)[0, self._prompt :]
    open_ = np.asarray(state.masked)[0, self._prompt :]
    self.blocks.append((begin - self.seconds, int((~open_).sum())))
    if self._tty:
      self._draw(tokens, filled, open_)
    else:
      # To the first mask: characters may need tokens of the next block.
      ready = int(np.argmax(open_)) if open_.any() else len(tokens)
      text = self._tokenizer.decode(tokens[:ready].tolist())
      if not text.endswith("�") or ready == len(tokens):
        print(text[self._written :], end="", flush=True)
        self._written = len(text)
    self.seconds += time.perf_counter() - begin

  def _draw(self, tokens, filled, open_):
    pieces = view.shown(pieces_of(self._tokenizer, tokens, self._mask))
    filled = np.where(open_, np.iinfo(np.int32).max, filled)
    for now in view.calls(np.where(open_, -1, filled)):
      if now <= self._last:
        continue
      text, self._above = view.redrawn(
        view.frame(pieces, filled, now),
        f"call {now + 1}",
        self._above,
        self._columns,
      )
      print(text, end="", flush=True)
      self._last = now
      time.sleep(FRAME)


def pieces_of(tokenizer: Any, tokens: Any, mask_id: int) -> list[str]:
  """Returns the text of each token."""
  return [
    view.HIDDEN
    if i == mask_id
    else tokenizer.decode([int(i)], skip_special=False)
    for i in tokens
  ]


def fill(
  loaded: Loaded,
  how: Spec,
  prompt: list[int],
  index: int,
  rules: Sampling,
  wanted: Wanted,
) -> dict[str, Any]:
  """Fills a row after a prompt; returns what is told of it.

  Args:
    loaded: the model.
    how: what its checkpoint says.
    prompt: ids.
    index: its number.
    rules: how candidates are drawn.
    wanted: the flags.

  Raises:
    UserError: it cannot be, or a file cannot be written.
  """
  state, options = begun(prompt, index, how, policy_of(wanted.policy), wanted)
  total, most = state.tokens.shape[1], loaded.model.max_positions
  if most is not None and total > most:
    raise UserError(
      f"--prompt: {len(prompt)} tokens and {total - len(prompt)} new ones are "
      f"{total}, more than the model's context of {most}; shorten it, or lower "
      "--max_new_tokens"
    )
  asked = denoiser_of(loaded, how, wanted, len(prompt))
  screen = _Screen(loaded.tokenizer, len(prompt), how.mask_id)
  begin = time.perf_counter()
  got = sampler.sample(asked, loaded.params, state, options, rules, screen)
  seconds = time.perf_counter() - begin - screen.seconds
  print(flush=True)
  made = got.tokens[0, len(prompt) :]
  made = made[: wanted.length]
  ends = np.flatnonzero(np.isin(made, options.end))
  count = int(ends[0]) if ends.size else len(made)
  pieces = pieces_of(loaded.tokenizer, got.tokens[0], how.mask_id)
  if wanted.html is not None:
    view.write_page(wanted.html, pieces, got.filled[0])
  if wanted.gif is not None:
    view.write_gif(wanted.gif, view.shown(pieces), got.filled[0])
  return {
    "text": loaded.tokenizer.decode(made[:count].tolist()),
    "tokens": count,
    "finish_reason": "stop" if ends.size else "length",
    "prompt_tokens": len(prompt),
    "calls": int(got.counts[0]),
    "tokens_per_call": count / max(int(got.counts[0]), 1),
    "tokens_per_s": _speed(screen.blocks, count),
    "seconds": seconds,
  }


def _speed(blocks: list[tuple[float, int]], count: int) -> float | None:
  """Returns tokens a second before the end, after the block that compiles."""
  if len(blocks) < 2:
    return None
  (first, ready), (last, _) = blocks[0], blocks[-1]
  return max(count - ready, 0) / max(last - first, 1e-9)
