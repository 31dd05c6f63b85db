"""What a block's logits are with and without caches, on real networks."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.diffusion import likelihood
from research.diffusion.sampling import sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.policies import Threshold
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.generation.sampling import Sampling
from research.typing import UserError
from tests import support
from tests.research.diffusion import passes

V, T, K = 24, 16, 4
MASK = V - 1


@functools.cache
def network(family="llama"):
  """Returns a model whose last layer is a run of its own, see `keep`."""
  model = support.model(
    family, depth=2, width=32, hidden=32, head_dim=8, vocab=V
  )
  return model, tree.unroll(support.params(model))


def rows(pads=(0, 0)):
  tokens = np.random.default_rng(0).integers(0, MASK, (2, T))
  tokens[:, T // 2 :] = MASK
  valid = np.arange(T) >= np.array(pads)[:, None]
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


def close(got, want):
  got, want = np.asarray(got), np.asarray(want)
  # Two layers in fp32.
  chex.assert_trees_all_close(
    got, want, atol=2e-5 * float(np.abs(want).max()), rtol=0
  )


def compiled(f):
  """Compiles it for each denoiser once; rows and places are data."""
  run = jax.jit(f, static_argnames="d")

  def call(d, *rows):
    params = network()[1]
    params = (
      with_prompts(params) if isinstance(d, ClassifierFreeGuidance) else params
    )
    return run(d, params, *rows)

  return call


@compiled
def scores(d, params, tokens, valid):
  return d.scores(params, tokens, valid)


@compiled
def first(d, params, tokens, valid, at):
  """Returns a block's logits."""
  return d.prefill(params, tokens, valid, at, K)[0]


@compiled
def twice(d, params, tokens, later, valid, at):
  """Returns a block's logits, and those of its rows at a later call."""
  logits, carry = d.prefill(params, tokens, valid, at, K)
  return logits, d.step(params, later, valid, at, K, carry)[0]


def by_hand(tokens, valid, block, shift):
  """Returns all logits, from one pass in numpy."""
  logits = passes.logits(*network(), tokens, valid, block)
  if shift:
    before = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    # A row's first token has padding before it, if anything.
    start = np.asarray(valid) & (np.cumsum(valid, axis=-1) == 1)
    logits = np.where(start[..., None], logits, before)
  return logits


def changed(tokens, places):
  """Returns rows with other tokens: by their place, of all rows."""
  tokens = np.array(tokens)
  for place, token in places.items():
    tokens[:, place] = token
  return jnp.asarray(tokens)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("pads", [(0, 0), (3, 1)])
@pytest.mark.sample(3)
def test_a_block_s_logits_are_its_rows_of_all(pads, shift):
  model = network()[0]
  tokens, valid = rows(pads)
  want = by_hand(tokens, valid, None, shift)
  whole = NoCache(model=model, shift=shift)
  cached = BlockCache(model=model, shift=shift)
  for d in (whole, cached):
    for at in (8, 12):
      got = first(d, tokens, valid, jnp.int32(at))
      close(got, want[:, at : at + K])
  close(scores(whole, tokens, valid), want)


def test_padding_on_the_left_changes_nothing():
  tokens, _ = rows()
  whole = NoCache(model=network()[0])
  some = jnp.asarray(np.asarray(tokens)[:, 5:])
  alone = scores(whole, some, jnp.ones(some.shape, bool))
  padded = np.broadcast_to(np.arange(T) >= 5, tokens.shape)
  got = scores(whole, changed(tokens, dict.fromkeys(range(5), 3)), padded)
  close(np.asarray(got)[:, 5:], alone)


@pytest.mark.parametrize("shift", [False, True])
def test_padding_on_the_right_changes_nothing(shift):
  model, params = network()
  tokens, _ = rows()
  whole = NoCache(model=model, shift=shift)

  @jax.jit
  def both():
    alone = whole.scores(params, tokens[:, :11], jnp.ones((2, 11), bool))
    valid = jnp.broadcast_to(jnp.arange(T) < 11, (2, T))
    return whole.scores(params, tokens.at[:, 11:].set(3), valid), alone

  got, alone = both()
  close(got[:, :11], alone)


@pytest.mark.parametrize(
  ("before", "after", "shift"),
  [
    (0, 0, False),
    (2, 1, True),
    (0, T, True),
    (T, T, False),
    *[
      pytest.param(*how, marks=pytest.mark.slow)
      for how in ((0, 0, True), (2, 1, False), (0, T, False), (T, T, True))
    ],
  ],
)
@pytest.mark.sample(4, 1)
def test_caches_are_exact_while_nothing_has_changed(before, after, shift):
  tokens, valid = rows((3, 0))
  d = BlockCache(model=network()[0], shift=shift, before=before, after=after)
  for at in (8, 12):
    once, again = twice(d, tokens, tokens, valid, jnp.int32(at))
    close(again, once)


@pytest.mark.parametrize(
  "cached",
  [
    lambda model: BlockCache(model=model),
    lambda model: PrefixCache(model=model),
    lambda model: DelayedKVCache(model=model, mask_id=MASK),
    lambda model: BlockCausal(model=model, block=K),
  ],
  ids=["block", "prefix", "delayed", "causal"],
)
def test_layers_with_a_window_read_what_they_read_without_a_cache(cached):
  """Half of a ring buffer would be that of a block's earlier step."""
  model, params = network("mistral")
  assert model.layer_kinds()[0].attention.window < 8
  tokens, valid = rows()
  d, at = cached(model), jnp.int32(8)
  causal = isinstance(d, BlockCausal)
  # Where all see all, keys and values are exact until a token changes.
  before = changed(tokens, {9: 5, 11: 2}) if causal else tokens

  @jax.jit
  def both():
    _, carry = d.prefill(params, before, valid, at, K)
    whole = NoCache(model=model, block=K if causal else None)
    want, _ = whole.prefill(params, tokens, valid, at, K)
    return d.step(params, tokens, valid, at, K, carry)[0], want

  close(*both())


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.sample(3)
def test_a_prefix_cache_reads_the_block_and_all_behind_it(shift):
  """Of rows whose texts end anywhere; a row's first block is behind nothing."""
  model = network()[0]
  tokens, _ = rows()
  valid = jnp.arange(T) < jnp.array([[T], [T - 3]])
  d, whole = (
    PrefixCache(model=model, shift=shift),
    NoCache(model=model, shift=shift),
  )

  def again(at, now):
    return twice(d, tokens, now, valid, jnp.int32(at))[1]

  def want(at, now):
    return first(whole, now, valid, jnp.int32(at))

  for at in (4, 8, 12):
    close(again(at, tokens), want(at, tokens))
  later = changed(tokens, {2: 5, 9: 6, 12: 7})
  close(again(0, later), want(0, later))
  # Tokens before the block have no keys but those they had, in any row.
  before = changed(tokens, {3: 6, 7: 5})
  close(again(8, before), want(8, tokens))
  # What is behind it is read anew.
  behind = changed(tokens, {12: 5})
  assert np.abs(again(8, behind) - want(8, tokens)).max() > 1e-3


def test_a_prefix_cache_reads_few_numbers_of_places():
  assert PrefixCache.spans(32, 256) == [32, 64, 96, 128, 192, 256]
  assert PrefixCache.spans(32, 200) == [32, 64, 96, 128, 192, 200]
  assert PrefixCache.spans(16, 16) == PrefixCache.spans(20, 16) == [16]


@pytest.mark.slow
def test_caches_drift_once_tokens_change_unless_all_is_read_again():
  tokens, valid = rows()
  later = changed(tokens, {9: 5})
  want = by_hand(later, valid, None, False)[:, 8:12]

  def error(before, after):
    d = BlockCache(model=network()[0], before=before, after=after)
    got = twice(d, tokens, later, valid, jnp.int32(8))[1]
    return float(np.abs(np.asarray(got) - want).max())

  scale = float(np.abs(want).max())
  assert error(T, T) < 2e-5 * scale
  assert error(0, 0) > 1e-3 * scale


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.sample(2)
def test_a_block_causal_model_s_cache_is_exact_at_every_step(shift):
  tokens, valid = rows()
  d = BlockCausal(model=network()[0], block=K, shift=shift)
  later = changed(tokens, {9: 5, 11: 2})
  want = [by_hand(x, valid, K, shift)[:, 8:12] for x in (tokens, later)]
  got = twice(d, tokens, later, valid, jnp.int32(8))
  for one, right in zip(got, want, strict=True):
    close(one, right)
  # The first block, which has no state before it.
  start = twice(d, tokens, later, valid, jnp.int32(0))[0]
  close(start, by_hand(tokens, valid, K, shift)[:, :K])


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.sample(2)
def test_what_is_remembered_from_block_to_block_is_what_is_read_anew(shift):
  model, params = network()
  tokens, valid = rows()
  d = BlockCausal(model=model, block=K, shift=shift)
  later = changed(tokens, dict.fromkeys(range(8, 12), 7))

  @jax.jit
  def both():
    memory = d.cache_finished(params, tokens, valid, jnp.int32(8), K)
    # What the steps of a block leave behind must not be seen again.
    _, memory = d.step(params, tokens, valid, jnp.int32(8), K, memory)
    at = params, later, valid, jnp.int32(12), K
    kept = d.step(*at, d.cache_finished(*at, memory))[0]
    return kept, d.prefill(*at)[0]

  kept, anew = both()
  close(kept, anew)
  close(kept, by_hand(later, valid, K, shift)[:, 12:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(BlockCausal):
  """A model whose rows may not be read anew."""

  def prefill(self, *args):
    raise AssertionError("a whole row was read")


GUIDED = functools.partial(ClassifierFreeGuidance, mask_id=MASK)
WRAPPERS = {
  "none": lambda inner: inner,
  "guided": lambda inner: GUIDED(inner=inner, weight=1.5),
  "not guided": lambda inner: GUIDED(inner=inner, weight=0.0),
  "credited": lambda inner: Credited(inner=inner, mask_id=MASK),
  "both": lambda inner: Credited(
    inner=GUIDED(inner=inner, weight=1.5), mask_id=MASK
  ),
}
RARE = "not guided", "both"


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_around_a_model_caches_what_it_does(name):
  model, wrapped = network()[0], WRAPPERS[name]
  assert wrapped(BlockCausal(model=model, block=K)).caches_finished
  assert not wrapped(NoCache(model=model, block=K)).caches_finished


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow if name in RARE else ())
    for name in WRAPPERS
  ],
)
@pytest.mark.sample(3)
def test_a_block_causal_model_reads_the_start_of_rows_once(name):
  """Whatever is around it; and what it samples is what whole rows give."""
  model, params = network()
  wrapped = WRAPPERS[name]
  if name not in ("none", "credited"):
    params = with_prompt(params, jnp.arange(16)[None] < 4)
  options = SamplerConfig(mask_id=MASK, length=12, block=K)
  programs = sampler.cache_finished._cache_size()
  found = []
  for inner in (Watched(model=model, block=K), NoCache(model=model, block=K)):
    state = sampler.start([[3, 1, 4, 1]], options, jax.random.key(1))
    found.append(sampler.sample(wrapped(inner), params, state, options))
  each = 2 if name in ("guided", "both") else 1
  assert found[0].calls == found[1].calls == 12 * each
  np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
  # The row's start is one program, all blocks after it another.
  assert sampler.cache_finished._cache_size() - programs == 2


def test_a_cache_of_finished_blocks_is_there_once():
  """What goes into a block's program is what comes out of it."""
  model, params = network()
  d = BlockCausal(model=model, block=K)
  options = SamplerConfig(mask_id=MASK, length=8, block=K)
  state = sampler.start([[3, 1, 4, 1]] * 64, options, jax.random.key(0))
  at = jnp.int32(K)
  memory = sampler.cache_finished(d, params, state, at, K, None)
  size = sum(x.nbytes for x in jax.tree.leaves(memory[0].layers))
  program = sampler.fill_block.lower(
    d, params, state, at, options.of_block, memory=memory
  ).compile()
  assert program.memory_analysis().alias_size_in_bytes >= size
  state, _, kept = sampler.fill_block(
    d, params, state, at, options.of_block, memory=memory
  )
  assert memory[0].layers["run0"]["layer0"].k.is_deleted()
  chex.assert_trees_all_equal_shapes(kept[0].layers, memory[0].layers)


def test_guidance_needs_to_know_prompts():
  model, params = network()
  d = ClassifierFreeGuidance(inner=NoCache(model=model), mask_id=MASK)
  with pytest.raises(
    UserError, match="of classifier_free_guidance.with_prompt"
  ):
    d.prefill(params, *rows(), jnp.int32(8), K)


def guided(inner, weight):
  return ClassifierFreeGuidance(inner=inner, mask_id=MASK, weight=weight)


def with_prompts(params):
  """Returns parameters for `guided`: the first half of each row is asked by."""
  prompt = jnp.broadcast_to(jnp.arange(T) < T // 2, (2, T))
  return with_prompt(params, prompt)


@dataclasses.dataclass(frozen=True)
class Counted(Denoiser):
  """A model that adds one to `log` at each of its forward passes."""

  log = []

  def prefill(self, params, tokens, valid, start, size):
    jax.debug.callback(lambda _: self.log.append(1), tokens)
    place = jnp.arange(T)[:, None]
    logits = jnp.sin(place + 2.0 * jnp.arange(V) + tokens.sum() * 0.1)
    logits = jnp.broadcast_to(logits, (*tokens.shape, V))
    return jax.lax.dynamic_slice_in_dim(logits, start, size, axis=1), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


@pytest.mark.parametrize(("weight", "each"), [(1.5, 2), (0.0, 1)])
@pytest.mark.sample(2)
def test_calls_are_forward_passes(weight, each):
  """With guidance there are two a step."""
  options = SamplerConfig(mask_id=MASK, length=T // 2, block=K)
  tokens, valid = rows()
  masked = np.arange(T) >= np.array([[T // 2], [T - 2]])
  tokens = np.where(masked, MASK, np.asarray(tokens) % MASK)
  for around in (lambda d: d, lambda d: Credited(inner=d, mask_id=MASK)):
    state = sampler.begin(tokens, masked, np.asarray(valid), jax.random.key(0))
    d = around(guided(Counted(), weight))
    Counted.log.clear()
    got = sampler.sample(d, with_prompts({}), state, options)
    jax.effects_barrier()
    assert got.calls == len(Counted.log) == 8 * each
    np.testing.assert_array_equal(got.counts, [8 * each, 2 * each])
    assert got.tokens_per_call == 10 / (10 * each)
    assert got.filled.max() == 7  # a step is a step


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_guidance_has_a_cache_a_side(weight):
  """With all read again, what it is without a cache."""
  model = network()[0]
  tokens, valid = rows((3, 0))
  later = changed(tokens, {9: 5})
  found = []
  for inner in (
    NoCache(model=model),
    BlockCache(model=model, before=T, after=T),
  ):
    d = guided(inner, weight)
    found.append(twice(d, tokens, later, valid, jnp.int32(8))[1])
  close(found[1], found[0])


def test_no_guidance_is_no_guidance():
  """Bit by bit, and one pass: research/diffusion/MATH.md 6.3."""
  tokens, valid = rows((3, 0))
  inner = BlockCache(model=network()[0])
  d = guided(inner, 0.0)
  at = tokens, tokens, valid, jnp.int32(8)
  found = [twice(how, *at) for how in (d, inner)]
  chex.assert_trees_all_equal(*found)


@pytest.mark.slow
def test_likelihoods_by_the_cache_are_those_without():
  """Of a block of four after eight tokens, and of the first block."""
  model, params = network()
  tokens = np.random.default_rng(3).integers(0, MASK, T)
  tokens, key = jnp.asarray(tokens, jnp.int32), jax.random.key(0)
  d = BlockCausal(model=model, block=K)
  whole = NoCache(model=model, block=K)

  @jax.jit
  def read(noisy):
    logits = whole.scores(params, noisy, jnp.ones(noisy.shape, bool))
    return logits.at[..., MASK].set(-1e30)

  for start in (8, 0):
    here = (jnp.arange(T) >= start) & (jnp.arange(T) < start + K)
    cached = likelihood.block_scores(d, params, tokens, start, MASK, 8)
    block, every = tokens[start : start + K], jnp.ones(K, bool)
    got = likelihood.bound(cached, block, every, MASK, key, 15, 8)
    want = likelihood.exact(read, tokens, here, MASK, 8)
    assert got.mean == pytest.approx(want.mean, rel=2e-5)
    # Fewer rows than it was made for.
    noisy = jnp.where(jnp.arange(K) % 2 == jnp.arange(2)[:, None], MASK, block)
    rest = jnp.broadcast_to(tokens, (2, T))
    logits = read(rest.at[:, start : start + K].set(noisy))
    close(cached(noisy)[..., :MASK], logits[:, start : start + K, :MASK])


def test_likelihoods_by_the_cache_start_where_a_block_does():
  model, params = network()
  d, tokens = BlockCausal(model=model, block=K), jnp.zeros(T, jnp.int32)
  with pytest.raises(UserError, match="start is 3, expected a multiple"):
    likelihood.block_scores(d, params, tokens, 3, MASK)
  scores = likelihood.block_scores(d, params, tokens, 0, MASK, 2)
  with pytest.raises(UserError, match="found 3 rows, expected at most 2"):
    scores(jnp.full((3, K), MASK, jnp.int32))


def test_blocks_are_those_of_the_model():
  model, params = network()
  tokens, valid = rows()
  with pytest.raises(UserError, match="blocks of 8 tokens, but the model's"):
    BlockCausal(model=model, block=K).prefill(
      params, tokens, valid, jnp.int32(0), 8
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  "temperature", [None, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_a_block_causal_model_samples_the_same_with_its_cache(temperature):
  model, params = network()
  options = SamplerConfig(
    mask_id=MASK, length=12, block=K, policy=Threshold(threshold=0.2)
  )
  found = []
  for d in (NoCache(model=model, block=K), BlockCausal(model=model, block=K)):
    state = sampler.start([[3, 1, 4, 1]] * 2, options, jax.random.key(1))
    found.append(
      sampler.sample(
        d, params, state, options, Sampling(temperature=temperature)
      )
    )
  np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
  assert found[0].calls == found[1].calls
