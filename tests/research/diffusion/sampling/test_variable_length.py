"""Canvases that grow, against a loop over lists that really get longer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import sampler, variable_length
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.denoiser import (
  BlockCache,
  Denoiser,
  NoCache,
  positions,
)
from research.diffusion.sampling.policies import Quota, Threshold
from research.generation.sampling import GREEDY, Sampling
from research.typing import UserError
from tests.research.diffusion import passes
from tests.research.diffusion.sampling.test_denoiser import MASK, network

END, ALSO = 3, 5
PROMPTS = [[7, 1, 9], [2, 11, 4]]
WIDTH = 3
OPTIONS = SamplerConfig(
  mask_id=MASK, length=20, block=4, end=(END, ALSO),
  policy=Threshold(threshold=0.5),
)  # fmt: skip
GROWTH = Growth(start=4, by=3, window=4, ends=2)


known = functools.partial(dataclasses.field, compare=False)


@dataclasses.dataclass(frozen=True)
class Sharp(Denoiser):
  """A random network, sure of itself; likes ends from a place on.

  What it is asked with has these numbers, see `given`, so that any two of these
  share a program.

  Attributes:
    middle: of the row, where ends begin to be likely.
    slope: how soon they are.
    scale: of the logits of the network.
  """

  middle: float = known(default=6.0)
  slope: float = known(default=2.0)
  scale: float = known(default=1.0)

  def prefill(self, params, tokens, valid, start, size):
    whole = NoCache(model=network()[0])
    logits, _ = whole.prefill(params["network"], tokens, valid, start, size)
    return self.tilted(params, logits, valid, start, size), ()

  def tilted(self, params, logits, valid, start, size):
    place = jax.lax.dynamic_slice_in_dim(positions(valid), start, size, axis=1)
    tilt = params["slope"] * (place - params["middle"])[..., None]
    ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array([END, ALSO]))
    return params["scale"] * logits + jnp.where(ends, tilt, 0.0)

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


def given(asked):
  """Returns the parameters that a denoiser is asked with."""
  if type(asked) is ClassifierFreeGuidance:
    prompt = jnp.arange(WIDTH + OPTIONS.length) < WIDTH
    return with_prompt(given(asked.inner), prompt[None])
  asked = getattr(asked, "like", asked)
  if not isinstance(asked, Sharp):
    return network()[1]
  numbers = {k: np.float32(v) for k, v in vars(asked).items()}
  return {"network": network()[1], **numbers}


def run(
  growth=GROWTH, options=OPTIONS, prompts=PROMPTS, asked=None, sampling=GREEDY,
  key=0, examples=None,
):  # fmt: skip
  config = dataclasses.replace(options, canvas=growth)
  state = variable_length.start(prompts, config, jax.random.key(key), examples)
  asked = Sharp() if asked is None else asked
  return variable_length.sample(asked, given(asked), state, config, sampling)


# Against the paper's loop ----------------------------------------------------


@functools.cache
def reader(length):
  """Returns `row -> logits [length, V]` of rows of just this length."""
  valid = np.ones((1, length), bool)
  return lambda row: passes.logits(*network(), [row], valid, None)[0]


def logits_of(asked, row):
  if isinstance(asked, ClassifierFreeGuidance):
    hidden = [MASK] * WIDTH + row[WIDTH:]
    told, blind = logits_of(asked.inner, row), logits_of(asked.inner, hidden)
    return blind + (1 + asked.weight) * (told - blind)
  z = asked.scale * reader(len(row))(row).astype(np.float64)
  place = np.arange(len(row))[:, None]
  z[:, [END, ALSO]] += asked.slope * (place - asked.middle)
  return z


def probabilities(asked, row):
  z = logits_of(asked, row)
  z[:, MASK] = -np.inf
  p = np.exp(z - z.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def end_confidence(p, row, begin, window):
  sure = []
  for i in reversed(range(begin, len(row))):
    found, chance = row[i], 1.0
    if found == MASK:
      found, chance = int(p[i].argmax()), p[i].max()
    if found in (END, ALSO) and len(sure) < window:
      sure.append(chance)
  return sum(sure) / window


def filled_now(p, row, block, options):
  """Returns the masked places of a block that are kept."""
  sure = {i: p[i].max() for i in block if row[i] == MASK}
  if options.select == "margin":
    sure = {i: x - np.sort(p[i])[-2] for i, x in sure.items()}
  best = max(sure, key=lambda i: (sure[i], -i))
  if isinstance(options.policy, Quota):
    return [best]
  return [i for i in sure if sure[i] >= options.policy.threshold or i == best]


def by_hand(asked, prompt, growth, options):
  """Returns a row by DAEDAL's algorithm: it, looks, blocks' calls, inserted."""
  begin, most = len(prompt), options.length
  row, looks, inserted = list(prompt) + [MASK] * growth.start, 0, 0
  while len(row) - begin < most:
    p, looks = probabilities(asked, row), looks + 1
    if end_confidence(p, row, begin, growth.window) >= growth.eos_threshold:
      break
    row += [MASK] * min(growth.by, most - (len(row) - begin))
  row += [END] * min(growth.ends, most - (len(row) - begin))
  calls, at = [], begin
  while MASK in row:
    calls.append(0)
    while MASK in row[at : at + options.block]:
      block = range(at, min(at + options.block, len(row)))
      p = probabilities(asked, row)
      calls[-1] += 1
      ready = end_confidence(p, row, begin, growth.window)
      for i in filled_now(p, row, block, options):
        row[i] = int(p[i].argmax())
      doubt = [
        i for i in block if row[i] == MASK and p[i].max() < growth.low_threshold
      ]
      more = min(growth.by - 1, most - (len(row) - begin))
      if doubt and ready < growth.expand_threshold and more:
        spot = min(doubt, key=lambda i: p[i].max())
        row[spot : spot + 1] = [MASK] * (1 + more)
        inserted += more
    at += options.block
    ends = [i for i in range(begin, min(at, len(row))) if row[i] in options.end]
    if options.stop_early and ends:
      row[ends[0] :] = [row[ends[0]]] * (len(row) - ends[0])
  return row, looks, calls, inserted


CASES = [
  (dict(low_threshold=0.3), {}, Sharp()),
  (dict(low_threshold=0.4), dict(policy=Quota()), Sharp(middle=8.0)),
  (dict(low_threshold=0.4, by=4), dict(stop_early=False), Sharp(scale=2.0)),
  (
    dict(low_threshold=0.4, eos_threshold=0.3),
    dict(select="margin"),
    Sharp(middle=11.0),
  ),
  (
    dict(low_threshold=0.9, eos_threshold=0.0, expand_threshold=1.0),
    {},
    Sharp(scale=2.0),
  ),
  (
    dict(ends=0),
    {},
    ClassifierFreeGuidance(inner=Sharp(middle=8.0), mask_id=MASK),
  ),
]
CASES = [
  (dataclasses.replace(GROWTH, **g), dataclasses.replace(OPTIONS, **o), asked)
  for g, o, asked in CASES
]


@pytest.mark.slow
@pytest.mark.parametrize(("growth", "options", "asked"), CASES)
@pytest.mark.sample(6, 1)
def test_is_the_paper_s_loop(growth, options, asked):
  got = run(growth, options, asked=asked)
  looks, blocks, each = (
    [],
    [],
    2 if isinstance(asked, ClassifierFreeGuidance) else 1,
  )
  for i, prompt in enumerate(PROMPTS):
    row, looked, calls, _ = by_hand(asked, prompt, growth, options)
    np.testing.assert_array_equal(got.tokens[i, : len(row)], row)
    assert got.canvas[i] == len(row) - len(prompt)
    assert (got.tokens[i, len(row) :] == END).all()
    assert got.counts[i] == each * (looked + sum(calls))
    looks, blocks = [*looks, looked], [*blocks, calls]
  # A batch's calls are those of whoever still needs them.
  steps = [max((c[b : b + 1] or [0])[0] for c in blocks) for b in range(5)]
  assert got.calls == each * (max(looks) + sum(steps))


def test_the_cases_grow_in_both_ways_and_end_before_they_have_to():
  found = [
    by_hand(asked, prompt, growth, options)
    for growth, options, asked in CASES
    for prompt in PROMPTS
  ]
  assert len({looks for _, looks, *_ in found}) > 2
  assert len({inserted for *_, inserted in found}) > 3
  lengths = {len(row) - 3 for row, *_ in found}
  assert len(lengths) > 4 and OPTIONS.length in lengths


@pytest.mark.slow
def test_the_caller_s_rows_are_the_caller_s():
  config = dataclasses.replace(OPTIONS, canvas=GROWTH)
  state = variable_length.start(PROMPTS, config, jax.random.key(0))
  kept, given_ = [], (Sharp(), given(Sharp()))
  found = [
    variable_length.sample(*given_, state, config, GREEDY, look)
    for look in (kept.append, None)
  ]
  np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
  for rows in kept:
    assert rows.tokens.shape == state.tokens.shape
    assert not rows.tokens.is_deleted()


# Laws ------------------------------------------------------------------------

NEVER, ALWAYS = Sharp(middle=1e4), Sharp(middle=-1e4)
HOT = Sampling(temperature=1.5)


@pytest.mark.slow
def test_grows_while_the_model_does_not_expect_an_end():
  got = run(dataclasses.replace(GROWTH, low_threshold=1.0), asked=NEVER)
  np.testing.assert_array_equal(got.canvas, OPTIONS.length)
  np.testing.assert_array_equal(got.lengths, OPTIONS.length)
  assert not np.isin(got.tokens, OPTIONS.end)[:, 3:].any()


def test_does_not_grow_where_it_does():
  growth = dataclasses.replace(GROWTH, low_threshold=1.0)
  got = run(growth, asked=ALWAYS)
  # One look, one call for a block of ends; and the ends behind the canvas.
  np.testing.assert_array_equal(got.counts, 2)
  np.testing.assert_array_equal(got.canvas, growth.start + growth.ends)
  np.testing.assert_array_equal(got.lengths, 0)
  assert got.calls == 2 and got.tokens_per_call == 0


@pytest.mark.parametrize(
  ("longest", "policy"),
  [
    pytest.param(8, Quota(), marks=pytest.mark.slow),
    (20, Threshold(threshold=0.4)),
  ],
)
@pytest.mark.slow
def test_thresholds_that_forbid_growth_are_the_fixed_canvas(longest, policy):
  """Draws included; with no room to grow, calls too."""
  fixed = dataclasses.replace(OPTIONS, length=8, policy=policy)
  state = sampler.start(PROMPTS, fixed, jax.random.key(5))
  want = sampler.sample(Sharp(), given(Sharp()), state, fixed, HOT)
  options = dataclasses.replace(fixed, length=longest)
  never = Growth(start=8, eos_threshold=0.0, expand_threshold=0.0, ends=0)
  got = run(never, options, sampling=HOT, key=5)
  np.testing.assert_array_equal(got.tokens[:, :11], want.tokens)
  np.testing.assert_array_equal(got.lengths, want.lengths)
  np.testing.assert_array_equal(got.canvas, 8)
  looks = int(longest > 8)
  np.testing.assert_array_equal(got.counts, want.counts + looks)
  np.testing.assert_array_equal(
    got.filled[:, :11], np.where(want.filled < 0, -1, want.filled + looks)
  )


@dataclasses.dataclass(frozen=True)
class Tilted(Denoiser):
  """What `Sharp` is, of any way to read rows."""

  inner: Any
  like: Sharp = Sharp()

  def prefill(self, params, tokens, valid, start, size):
    rows = tokens, valid, start, size
    logits, carry = self.inner.prefill(params["network"], *rows)
    return self.like.tilted(params, logits, *rows[1:]), carry

  def step(self, params, tokens, valid, start, size, carry):
    rows = tokens, valid, start, size
    logits, carry = self.inner.step(params["network"], *rows, carry)
    return self.like.tilted(params, logits, *rows[1:]), carry


@pytest.mark.parametrize(
  "shift", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.slow
def test_a_cache_that_reads_all_again_is_none(shift):
  """Where canvases do grow, before and within blocks."""
  model = network()[0]
  growth = dataclasses.replace(GROWTH, low_threshold=0.4)
  prompts = [[7, 1, 9], [2], [2, 11, 4, 5, 6]]
  cached = BlockCache(model=model, shift=shift, before=9)
  want = run(
    growth, prompts=prompts, asked=Tilted(NoCache(model=model, shift=shift))
  )
  got = run(growth, prompts=prompts, asked=Tilted(cached))
  for name in ("tokens", "filled", "counts", "canvas"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  assert len(set(got.canvas.tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("longest", "shift"),
  [
    (8, True),
    pytest.param(20, False, marks=pytest.mark.slow),
    pytest.param(8, False, marks=pytest.mark.slow),
    pytest.param(20, True, marks=pytest.mark.slow),
  ],
)
def test_the_prompt_s_cache_is_that_of_a_fixed_canvas(longest, shift):
  """Where thresholds forbid growth: draws included."""
  model, params = network()
  fixed = dataclasses.replace(OPTIONS, length=8)
  prompts = [[7, 1, 9, 2, 2, 4, 6, 1], [2, 11, 4]]
  state = sampler.start(prompts, fixed, jax.random.key(5))
  asked = BlockCache(model=model, shift=shift, after=4)
  want = sampler.sample(asked, params, state, fixed, HOT)
  options = dataclasses.replace(fixed, length=longest)
  never = Growth(start=8, eos_threshold=0.0, expand_threshold=0.0, ends=0)
  got = run(
    never, options, prompts, BlockCache(model=model, shift=shift), HOT, key=5
  )
  np.testing.assert_array_equal(got.tokens[:, :16], want.tokens)
  np.testing.assert_array_equal(got.counts, want.counts + int(longest > 8))


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch():
  prompts = [[7, 1, 9], [2], [2, 11, 4], [8, 8]]
  growth = dataclasses.replace(GROWTH, low_threshold=0.4)
  whole = run(growth, prompts=prompts, sampling=HOT)
  # As many of them, by the same program.
  some = run(
    growth, prompts=[prompts[2], prompts[1]] * 2, sampling=HOT,
    examples=jnp.array([2, 1, 0, 3]),
  )  # fmt: skip
  assert len(set(whole.canvas.tolist())) > 1
  for a, b in ((0, 2), (1, 1)):
    np.testing.assert_array_equal(some.tokens[a], whole.tokens[b])
    for name in ("counts", "canvas", "lengths"):
      assert getattr(some, name)[a] == getattr(whole, name)[b]


@pytest.mark.slow
def test_no_length_compiles_again():
  growth = CASES[0][0]
  programs = variable_length._measured, variable_length.grow_block
  first = run(growth)
  held = [program._cache_size() for program in programs]
  again = run(growth, prompts=PROMPTS[:1] * 2, key=1)
  assert first.canvas.tolist() != again.canvas.tolist()
  assert held == [program._cache_size() for program in programs]


# Bad input -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("growth", "options", "words"),
  [
    (dict(start=21), {}, "expected auto:N with N from 1 to length=20"),
    ({}, dict(end=()), "end is empty"),
    ({}, dict(policy=Quota(), steps=5), "steps=5: not with canvas=auto:4"),
    ({}, dict(policy=Quota(), plan="cosine"), "plan=cosine: not with canvas"),
    ({}, dict(edit=0.9), "edit=0.9: not with canvas"),
  ],
)
def test_what_does_not_go_together(growth, options, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(
      OPTIONS, canvas=dataclasses.replace(GROWTH, **growth), **options
    )


def test_a_fixed_canvas_and_one_that_grows_have_samplers_of_their_own():
  key, growing = jax.random.key(0), dataclasses.replace(OPTIONS, canvas=GROWTH)
  asked = Sharp(), given(Sharp())
  with pytest.raises(UserError, match="canvas is None, expected a Growth"):
    variable_length.start(PROMPTS, OPTIONS, key)
  with pytest.raises(UserError, match="which variable_length.sample fills"):
    sampler.sample(*asked, sampler.start(PROMPTS, OPTIONS, key), growing)
  blocks = NoCache(model=network()[0], block=4), {}
  state = variable_length.start(PROMPTS, growing, key)
  with pytest.raises(UserError, match="found a model with blocks of 4 tokens"):
    variable_length.sample(*blocks, state, growing)


def test_a_mask_in_the_prompt():
  with pytest.raises(UserError, match="prompt 2 holds the mask"):
    run(prompts=[[1], [MASK]])


@pytest.mark.parametrize(
  ("masks", "words"), [(4, "while the canvas's length"), (1, "block at 3 ")]
)
def test_logits_that_are_no_numbers_end_and_are_told(masks, words):
  @dataclasses.dataclass(frozen=True)
  class Broken(Denoiser):
    """All tokens are as likely, so that a call fills a place."""

    def prefill(self, params, tokens, valid, start, size):
      now = (tokens == MASK).sum() <= masks * len(PROMPTS)
      value = jnp.where(now, jnp.nan, 0.0)
      return jnp.full((len(tokens), size, MASK + 1), value), ()

    def step(self, params, tokens, valid, start, size, carry):
      return self.prefill(params, tokens, valid, start, size)

  growth = dataclasses.replace(GROWTH, eos_threshold=0.0, low_threshold=0.0)
  with pytest.raises(UserError, match=words):
    run(growth, asked=Broken())
