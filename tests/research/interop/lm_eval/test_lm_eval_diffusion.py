"""The harness's questions to models that fill in masks."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import likelihood
from research.diffusion.sampling import sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import (
  Delayed,
  Dual,
  Prefix,
  SamplerConfig,
)
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.sampling.policies import Threshold
from research.interop import lm_eval
from research.interop.diffusion.spec import Spec
from research.interop.lm_eval import diffusion_generate, lm_eval_diffusion
from research.interop.lm_eval.lm_eval_diffusion import DiffusionEvalSettings
from research.interop.loaded import Loaded
from research.text.special_tokens import SpecialTokens
from research.typing import UserError
from tests import support
from tests.research.interop.lm_eval.test_autoregressive import tokenizer

MASK, CONTEXT = 63, 24


@pytest.fixture(scope="module")
def plain():
  model = support.model().clone(max_positions=CONTEXT)
  return Loaded(model, support.params(model), tokenizer(), {"format": "test"})


@pytest.fixture(scope="module")
def loaded(plain):
  return dataclasses.replace(plain, diffusion=Spec(mask_id=MASK, end=(1,)))


def exact(loaded, ids, first, guidance=0.0, prompt=None) -> float:
  """Returns the bound on -log p(ids[first:] | ids[:first]), over all masks.

  Guided by as many tokens as `prompt`; by default those before `first`.
  """
  prompt = first if prompt is None else prompt
  denoiser = NoCache(model=loaded.model, block=loaded.diffusion.block)
  tokens = jnp.asarray([*ids, *[0] * (16 - len(ids))])
  place = jnp.arange(16)
  target = (place >= first) & (place < len(ids))
  scores = lm_eval_diffusion.scores_of(
    denoiser, loaded.params, place < len(ids), MASK
  )
  scores = likelihood.guided(scores, place < prompt, MASK, guidance)
  total, length = 0.0, len(ids) - first
  for n in range(1, length + 1):
    sets = list(itertools.combinations(range(first, len(ids)), n))
    masks = np.zeros((4, 16), bool)  # few shapes: few programs
    for row, chosen in zip(masks, sets, strict=False):
      row[list(chosen)] = True
    found = likelihood.values(scores, tokens, target, jnp.asarray(masks), MASK)
    total += float(found[: len(sets)].mean())
  return total / length


@pytest.mark.slow
def test_the_estimate_is_of_the_bound(loaded):
  context, continuation = [0, 9, 10, 11], [12, 13, 14]
  want = exact(loaded, [*context, *continuation], 4)
  # Seven sets of masks: no more than samples, they are all tried.
  [(value, greedy)] = lm_eval_diffusion.score(
    loaded,
    [(context, continuation)],
    DiffusionEvalSettings(samples=8, batch_size=8),
  )
  assert -value == pytest.approx(want, rel=1e-5) and not greedy
  drawn = [
    lm_eval_diffusion.score(
      loaded,
      [(context, continuation)],
      DiffusionEvalSettings(samples=6, batch_size=3, seed=s),
    )[0][0]
    for s in range(32)
  ]
  error = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
  assert error > 0 and abs(np.mean(drawn) + want) < 4 * error


@pytest.mark.slow
def test_a_single_token_takes_one_exact_sample(loaded):
  ids = [0, 9, 10, 11]
  [(value, _)] = lm_eval_diffusion.score(loaded, [(ids[:3], ids[3:])])
  assert -value == pytest.approx(exact(loaded, ids, 3), rel=1e-5)
  [(guided, _)] = lm_eval_diffusion.score(
    loaded, [(ids[:3], ids[3:])], DiffusionEvalSettings(guidance=1.5)
  )
  want = exact(loaded, ids, 3, guidance=1.5)
  assert -guided == pytest.approx(want, rel=1e-5)
  assert guided != pytest.approx(value, rel=1e-2)


def test_blocks_of_one_token_are_the_model_that_it_was(plain):
  """A converted model's value is exact: the chain rule, token by token."""
  blocks = dataclasses.replace(
    plain, diffusion=Spec(mask_id=MASK, shift=True, block=1)
  )
  pairs = [("hello", " you"), ("", "abc")]
  # The mask has no probability, which a model without one gives it.
  head = plain.params["embed"].at[MASK].set(0.0)
  low = plain.params | {"embed": head}
  text = [lm_eval.harness_requests.encoded(plain.tokenizer, *p) for p in pairs]
  want = []
  for context, continuation in text:
    tokens = jnp.asarray([[*context, *continuation]])
    hidden, _ = plain.model.apply({"params": low}, tokens)
    logits = plain.model.apply({"params": low}, hidden, method="logits")
    logits = logits[0].at[:, MASK].set(-jnp.inf)
    logp = jax.nn.log_softmax(logits)[len(context) - 1 : -1]
    want.append(float(logp[jnp.arange(len(continuation)), jnp.asarray(continuation)].sum()))  # fmt: skip # noqa: E501
  blocks = dataclasses.replace(blocks, params=low)
  got = lm_eval_diffusion.loglikelihood(blocks, pairs)
  np.testing.assert_allclose([v for v, _ in got], want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.sample(2)
def test_blocks_follow_clean_ones(loaded, monkeypatch, guidance):
  """Two blocks of 2 behind a context: the sum of two bounds.

  Clean blocks are read once, by the model's own cache, never as whole rows.
  """
  blocks = dataclasses.replace(
    loaded, diffusion=Spec(mask_id=MASK, end=(1,), block=2)
  )
  ids = [0, 9, 10, 11, 12, 13]
  how = DiffusionEvalSettings(samples=256, guidance=guidance)

  def bound(size, first, prompt):
    return exact(blocks, ids[:size], first, guidance, prompt)

  want = bound(4, 2, 2) + bound(6, 4, 2)
  # One that begins within a block is asked of the rest of it first, and ends
  # within one.
  within = bound(4, 3, 3) + bound(5, 4, 3)
  monkeypatch.setattr(NoCache, "scores", None)
  read = []
  cache_finished = BlockCausal.cache_finished

  def watched(self, params, tokens, valid, start, size, memory=None):
    read.append((tokens.shape[0], memory is not None))
    return cache_finished(self, params, tokens, valid, start, size, memory)

  monkeypatch.setattr(BlockCausal, "cache_finished", watched)
  jax.clear_caches()
  asked = [(ids[:2], ids[2:]), (ids[:3], ids[3:5])]
  found = lm_eval_diffusion.score(blocks, asked, how)
  # Of two tokens all sets are tried.
  assert -found[0][0] == pytest.approx(want, rel=1e-5)
  assert -found[1][0] == pytest.approx(within, rel=1e-5)
  # Traced: one row's prefix, and one block more.
  assert read == [(1, False), (1, True)]


def test_values_do_not_depend_on_their_company(loaded):
  pairs = [("hello", " you"), ("a", "b then"), ("", "abc")]
  few = DiffusionEvalSettings(
    samples=2, batch_size=2
  )  # fewer than there are sets of masks
  ask = lm_eval_diffusion.loglikelihood
  all_of_them = ask(loaded, pairs, settings=few)
  assert ask(loaded, pairs[:1], settings=few) == all_of_them[:1]
  other = dataclasses.replace(few, seed=1)
  assert ask(loaded, pairs, settings=other) != all_of_them


def test_long_contexts_keep_bos(loaded):
  """Their beginning is left out behind it."""
  around = SpecialTokens(begin=(0,), every_row=True)
  words = dataclasses.replace(loaded.tokenizer, documents=around)
  loaded = dataclasses.replace(loaded, tokenizer=words)
  ids, asked = [0, *words.encode("abc xyz" * 6)], words.encode("xy")
  kept = [0, *ids[len(ids) - (CONTEXT - 1 - len(asked)) :]]
  assert len(kept) + len(asked) == CONTEXT < len(ids)
  long, short = (
    lm_eval_diffusion.score(loaded, [(context, asked)])
    for context in (ids, kept)
  )
  assert long == short
  [(value, _)] = lm_eval_diffusion.score(loaded, [([1, *kept[1:]], asked)])
  assert value != short[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("every_row", [False, True])
def test_rolling_windows_are_read_with_what_they_follow(loaded, every_row):
  around = SpecialTokens(begin=(0,), every_row=every_row)
  words = dataclasses.replace(loaded.tokenizer, documents=around)
  loaded = dataclasses.replace(loaded, tokenizer=words)
  text = "abc xyz" * 6
  ids = loaded.tokenizer.encode(text)
  size = CONTEXT - 1
  before = [0, *ids[-size:size]] if every_row else ids[-size - 1 : size]
  parts = [([0], ids[:size]), (before, ids[size:])]
  want = sum(v for v, _ in lm_eval_diffusion.score(loaded, parts))
  assert len(parts[1][0]) + len(parts[1][1]) == CONTEXT
  [got] = lm_eval_diffusion.rolling(loaded, [text])
  assert got == pytest.approx(want)


def test_greedy_is_asked_for(loaded):
  """The surest token first; without being asked, no continuation is it."""
  ids = [0, 9, 10]
  scores = lm_eval_diffusion.scores_of(
    NoCache(model=loaded.model), loaded.params, jnp.arange(16) < 4, MASK
  )
  row = jnp.asarray([[*ids, MASK, *[0] * 12]])
  best = int(scores(row)[0, 3].argmax())
  asked = [(ids, [best]), (ids, [5 if best != 5 else 6])]
  found = lm_eval_diffusion.score(
    loaded, asked, DiffusionEvalSettings(greedy=True)
  )
  assert [greedy for _, greedy in found] == [True, False]
  assert found[0][0] > found[1][0]
  found = lm_eval_diffusion.score(loaded, asked)
  assert [greedy for _, greedy in found] == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, 4])
def test_generate_until(loaded, block):
  it = dataclasses.replace(
    loaded, diffusion=dataclasses.replace(loaded.diffusion, block=block)
  )
  options = {"until": [], "max_gen_toks": 8, "do_sample": False}
  requests = [(text, options) for text in ("what", "is th", "a")]
  how = DiffusionEvalSettings(options=dict(block=4))
  whole = lm_eval_diffusion.generate_until(it, requests, batch=2, settings=how)
  programs = sampler.fill_block._cache_size()
  alone = lm_eval_diffusion.generate_until(it, requests, batch=1, settings=how)
  # Contexts of all lengths of a bucket share one.
  assert sampler.fill_block._cache_size() - programs <= 1
  assert whole == alone and all(len(text) <= 16 for text in whole)
  longest = max(whole, key=len)
  i, stop = whole.index(longest), longest[2:4]
  [cut] = lm_eval_diffusion.generate_until(
    it, [(requests[i][0], options | {"until": [stop]})], settings=how
  )
  assert cut == longest[: longest.index(stop)]


EOT = 7
SETTINGS = {
  # LLaDA-8B-Instruct's published settings, of smaller canvases: GSM8K and MATH
  # without blocks, HumanEval, MMLU, GSM8K in blocks (ML-GSAI/LLaDA, EVAL.md);
  # LLaDA 1.5's; Fast-dLLM's (eval_gsm8k.sh).
  "ends last": dict(
    length=8, block=8, steps=8, end=(1, EOT), ends="last", stop_early=False
  ),
  "no end": dict(
    length=8, block=8, steps=4, end=(1,), ends="never", stop_early=False
  ),
  "short": dict(length=3, block=3, steps=3, stop_early=False, cache=Delayed()),
  "blocks": dict(length=8, block=2, steps=8, select="random", stop_early=False),
  "dual": dict(
    length=8, block=4, policy=Threshold(threshold=0.3), cache=Dual()
  ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.sample(3)
def test_settings_are_the_sampler_s(loaded, monkeypatch, name):
  given, seen = SETTINGS[name], []
  sample = sampler.sample

  def watched(denoiser, params, state, options, *rest):
    seen.append((denoiser, options))
    seen.append(sample(denoiser, params, state, options, *rest))
    return seen[-1]

  monkeypatch.setattr(sampler, "sample", watched)
  how = DiffusionEvalSettings(options=given)
  asked = [("what", {"until": [], "max_gen_toks": 16})]
  [text] = lm_eval_diffusion.generate_until(loaded, asked, settings=how)
  (denoiser, options), rows = seen
  defaults = SamplerConfig(mask_id=MASK)
  for field in dataclasses.fields(SamplerConfig):
    want = given.get(field.name, getattr(defaults, field.name))
    if field.name == "end":
      want = given.get("end", (1,))
    assert getattr(options, field.name) == want, field.name
  kinds = {"dual": BlockCache, "short": DelayedKVCache}
  assert type(denoiser) is kinds.get(name, NoCache)
  # Without an early stop nothing is cut where a text ends.
  made = rows.tokens[0, -given["length"] :]
  if options.stop_early:
    made = made[: rows.lengths[0]]
  assert text == loaded.tokenizer.decode(made.tolist())
  if name == "no end":
    assert not np.isin(made, 1).any() and rows.calls == 4


@pytest.mark.parametrize(
  ("own", "block", "prompt"), [(None, None, 14), (None, 8, 8), (5, None, 10)]
)
def test_rows_of_whole_blocks_fit_the_context(
  loaded, monkeypatch, own, block, prompt
):
  """Of 24 tokens: 10 new ones are 16 in blocks of 8; 20 are 4 blocks of 5."""
  seen = []
  monkeypatch.setattr(
    sampler, "sample", lambda d, p, state, *rest: seen.append(state) or 1
  )
  it = dataclasses.replace(loaded, diffusion=Spec(mask_id=MASK, block=own))
  how = DiffusionEvalSettings(
    options={} if block is None else dict(block=block)
  )
  asked = [("a context of many tokens", {"max_gen_toks": 10})]
  with pytest.raises(AttributeError):  # nothing is filled
    lm_eval_diffusion.generate_until(it, asked, settings=how)
  [state] = seen
  assert state.valid.sum() <= CONTEXT
  assert (state.valid & ~state.masked).sum() == prompt


def test_a_model_of_blocks_has_its_steps_a_block(loaded, monkeypatch):
  """Its prompt ends within one, so that there is a block more; all cached."""
  seen = []
  monkeypatch.setattr(
    sampler, "sample", lambda d, p, s, o, rule: seen.append((d, o)) or 1
  )
  it = dataclasses.replace(
    loaded, diffusion=dataclasses.replace(loaded.diffusion, block=4, end=(5,))
  )
  stop = it.tokenizer.stop
  assert stop and 5 not in stop
  prompt = loaded.tokenizer.encode("what", add_special=True)
  assert len(prompt) % 4
  asked = [("what", {"until": [], "max_gen_toks": 8})]
  with pytest.raises(AttributeError):  # nothing was sampled
    how = DiffusionEvalSettings(options=dict(steps=4))
    lm_eval_diffusion.generate_until(it, asked, settings=how)
  [(denoiser, options)] = seen
  assert (options.length, options.block_steps) == (12, 2)
  assert options.end == tuple(sorted({5, *stop}))
  assert denoiser == BlockCausal(model=it.model, block=4)


def test_stops_are_found_among_special_tokens(loaded):
  """As LLaDA's harness does: they are cut at, then left out."""
  tokenizer = loaded.tokenizer
  ids = [9, 10, 1, 11, 12, 1, 13]
  text = tokenizer.decode(ids, skip_special=False)
  assert "</s>" in text
  got = diffusion_generate.text_of(tokenizer, ids, ("</s>",))
  assert got == tokenizer.decode(ids[:2])
  got = diffusion_generate.text_of(tokenizer, ids, (tokenizer.decode([12]),))
  assert got == tokenizer.decode([9, 10, 11])


def test_a_special_token_among_until_ends_a_text(loaded, monkeypatch):
  """Where texts are cut at their ends, too."""
  own = dataclasses.replace(loaded.tokenizer, stop=())
  it = dataclasses.replace(loaded, tokenizer=own)
  it = dataclasses.replace(
    it, diffusion=dataclasses.replace(it.diffusion, end=())
  )

  def sample(denoiser, params, state, config, rule):
    tokens = np.array(state.tokens)
    tokens[:, -4:] = [9, 10, 1, 11]
    return dataclasses.replace(state, tokens=tokens)

  monkeypatch.setattr(sampler, "sample", sample)
  for until, ids in (["</s>"], [9, 10]), ([], [9, 10, 11]):
    asked = [("what", {"until": until, "max_gen_toks": 4})]
    [got] = lm_eval_diffusion.generate_until(it, asked)
    assert got == own.decode(ids)


@pytest.mark.slow
def test_guidance_is_also_of_texts(loaded):
  """By hand: the sampler, guided by a prompt of as many tokens."""
  options = {"until": [], "max_gen_toks": 4}
  how = DiffusionEvalSettings(options=dict(block=4), guidance=3.0)
  [got] = lm_eval_diffusion.generate_until(
    loaded, [("what", options)], settings=how
  )
  prompt = loaded.tokenizer.encode("what", add_special=True)
  filling = SamplerConfig(mask_id=MASK, length=4, block=4, end=(1,))
  asked = ClassifierFreeGuidance(
    inner=NoCache(model=loaded.model), mask_id=MASK, weight=3.0
  )
  state = sampler.start([prompt], filling, jax.random.key(0))
  params = with_prompt(loaded.params, state.fixed)
  rows = sampler.sample(asked, params, state, filling)
  assert got == loaded.tokenizer.decode(
    rows.tokens[0, -4:][: rows.lengths[0]].tolist()
  )
  [plain] = lm_eval_diffusion.generate_until(
    loaded,
    [("what", options)],
    settings=DiffusionEvalSettings(options=dict(block=4)),
  )
  assert plain != got


def test_wrong_settings(loaded):
  with pytest.raises(
    UserError, match="'step', expected .*steps, stop_early or"
  ):
    DiffusionEvalSettings(options=dict(step=4))
  with pytest.raises(UserError, match="mask_id"):
    DiffusionEvalSettings(options=dict(mask_id=4))
  blocks = dataclasses.replace(loaded, diffusion=Spec(mask_id=MASK, block=4))
  asked = [("a", {"max_gen_toks": 8})]

  def ask(it, **how):
    lm_eval_diffusion.generate_until(
      it, asked, settings=DiffusionEvalSettings(**how)
    )

  with pytest.raises(UserError, match="block is 8, expected the model's, 4"):
    ask(blocks, options=dict(block=8))
  with pytest.raises(UserError, match="own cache, which is exact"):
    ask(blocks, options=dict(cache=Prefix()))
  with pytest.raises(UserError, match="steps is 3, expected a multiple of the"):
    ask(loaded, options=dict(block=4, steps=3))
  with pytest.raises(UserError, match="length is 24 in blocks of 8, expected"):
    ask(loaded, options=dict(length=CONTEXT, block=8))
  asked = [("a", {"max_gen_toks": CONTEXT})]
  with pytest.raises(UserError, match="length is 24 in blocks of 4, expected"):
    ask(blocks)


def test_wrong_questions(plain, loaded):
  with pytest.raises(UserError, match="has no mask"):
    lm_eval_diffusion.loglikelihood(plain, [("a", "b")])
  with pytest.raises(UserError, match="masked diffusion"):
    lm_eval.loglikelihood(loaded, [("a", "b")])
  with pytest.raises(UserError, match="masked diffusion"):
    lm_eval.rolling(loaded, ["a"])
  with pytest.raises(UserError, match="masked diffusion"):
    lm_eval.generate_until(loaded, [("a", {})])
  with pytest.raises(UserError, match="request 0: contains the mask"):
    lm_eval_diffusion.score(loaded, [([0], [MASK])])
  with pytest.raises(UserError, match="a continuation of 24 tokens"):
    lm_eval_diffusion.score(loaded, [([0], [5] * CONTEXT)])
  assert lm_eval_diffusion.score(loaded, [([0], [])]) == [(0.0, False)]


def test_the_adapter_asks_either_kind(plain, loaded):
  pytest.importorskip("lm_eval")
  request = type("Request", (), {"args": ("hello", " you")})
  how = DiffusionEvalSettings(samples=16)
  asked = lm_eval.adapter(loaded, diffusion=how).loglikelihood([request])
  assert asked == lm_eval_diffusion.loglikelihood(
    loaded, [request.args], settings=how
  )
  asked = lm_eval.adapter(plain).loglikelihood([request])
  assert asked == lm_eval.loglikelihood(plain, [request.args])
