"""The sampling loop against traces worked out elsewhere, and its laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import ancestral, sampler, variable_length
from research.diffusion.sampling.candidates import candidates
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.diffusion.sampling.policies import (
  Factor,
  Hierarchy,
  Quota,
  Threshold,
)
from research.diffusion.sampling.remask import Remask
from research.generation.sampling import Sampling
from research.typing import UserError
from tests.research.diffusion import joint
from tests.research.diffusion.sampling import test_ancestral

MASK = 7


@dataclasses.dataclass(frozen=True)
class Wave(Denoiser):
  """research/diffusion/MATH.md 6.1: logits of place, token before, masks."""

  def prefill(self, params, tokens, valid, start, size):
    left = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    many = (tokens == MASK).sum(-1)[:, None, None]
    i = jnp.arange(tokens.shape[1])[None, :, None]
    v = jnp.arange(8)
    z = 3 * jnp.sin(1 + 0.7 * i + 1.3 * v + 0.37 * left[..., None])
    z += 0.5 * jnp.cos(0.9 * many + v)
    z = z.at[..., MASK].set(-20.0)
    return jax.lax.dynamic_slice_in_dim(z, start, size, axis=1), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


TRACES = [
  (
    dict(steps=8, block=8),
    "2 5 1 3 2 2 6 4 4 4 3",
    "8;10;3;4;5;9;7;6",
  ),
  (dict(steps=4, block=4), "2 5 1 3 6 1 0 6 4 3 3", "3,4;5,6;9,10;7,8"),
  (dict(steps=4, block=8), "2 5 1 3 2 2 0 6 4 4 3", "8,10;3,6;4,9;5,7"),
  (
    dict(block=4, policy=Threshold(threshold=0.6)),
    "2 5 1 3 6 1 0 6 4 3 3",
    "4;3;6;5;8,9,10;7",
  ),
  (
    dict(block=8, policy=Factor()),
    "2 5 1 3 2 2 6 4 4 4 3",
    "8,10;3;4;5,9;7;6",
  ),
]


def run(prompts=((2, 5, 1),), key=0, examples=None, sampling=None, **options):
  options = SamplerConfig(mask_id=MASK, **{"length": 8} | options)
  state = sampler.start(
    [list(p) for p in prompts], options, jax.random.key(key), examples
  )
  given = {} if sampling is None else {"sampling": sampling}
  return sampler.sample(Wave(), {}, state, options, **given)


@pytest.mark.parametrize(("options", "text", "order"), TRACES)
@pytest.mark.sample(2)
def test_traces(options, text, order):
  got = run(**options)
  assert " ".join(map(str, got.tokens[0])) == text
  steps = [list(map(int, part.split(","))) for part in order.split(";")]
  want = np.full(11, -1)
  for n, places in enumerate(steps):
    want[places] = n
  np.testing.assert_array_equal(got.filled[0], want)
  assert got.calls == got.counts[0] == len(steps)


def test_confidences_of_what_is_kept():
  """The first trace, step by step."""
  options = SamplerConfig(mask_id=MASK, length=8, block=8)
  got, keys = run(steps=8, block=8), jax.random.split(jax.random.key(0), 1)
  final, filled = got.tokens[0], got.filled[0]

  @jax.jit
  def sure(row):
    logits, _ = Wave().prefill({}, row[None], None, jnp.int32(3), 8)
    return candidates(logits, keys, options, Sampling())[1][0]

  found = []
  for step in range(8):
    row = np.where(filled < step, final, MASK)
    found.append(sure(jnp.asarray(row))[np.argmax(filled == step) - 3])
  want = [0.722455, 0.628561, 0.637975, 0.747718]
  want += [0.779357, 0.753916, 0.512494, 0.570518]
  np.testing.assert_allclose(found, want, atol=2e-6)


# Policies --------------------------------------------------------------------


def kept(policy, confidence, eligible=None, quota=1):
  sure = jnp.asarray([confidence], jnp.float32)
  ok = jnp.ones_like(sure, bool) if eligible is None else jnp.array([eligible])
  got = policy.commit(sure, ok, jnp.array([quota]))
  assert not (got & ~ok).any()
  return np.flatnonzero(np.asarray(got[0])).tolist()


@pytest.mark.parametrize(("factor", "want"), [(0.5, 3), (1.0, 4), (1.5, 4)])
def test_factors(factor, want):
  got = kept(Factor(factor=factor), [0.7, 0.99, 0.9, 0.97, 0.8])
  assert len(got) == want
  assert got == sorted([1, 3, 2, 4, 0][:want])


def test_policies_by_hand():
  sure = [0.5, 0.95, 0.2, 0.93, 0.93]
  assert kept(Threshold(threshold=0.93), sure) == [1, 3, 4]
  assert kept(Threshold(threshold=0.99), sure) == [1]
  both = Threshold(threshold=0.94, quota_first=True)
  assert kept(both, sure, quota=3) == [1, 3, 4]
  assert kept(Quota(), sure, quota=2) == [1, 3]  # a tie: the lower place
  eligible = [True, False, True, True, True]
  assert kept(Threshold(threshold=0.99), sure, eligible) == [3]
  # Runs of masks: 0, and 2 to 4.
  assert kept(Hierarchy(low=0.4, threshold=0.99), sure, eligible) == [0, 3]
  assert kept(Hierarchy(low=0.99, threshold=0.99), sure, eligible) == [3]
  assert kept(Hierarchy(low=0.4, threshold=0.92), sure, eligible) == [0, 3, 4]


@pytest.mark.parametrize(
  "policy", [Quota(), Threshold(), Factor(), Hierarchy()], ids=str
)
@pytest.mark.sample(3)
def test_every_policy_fills_everything(policy):
  got = run(block=4, policy=policy)
  assert (got.tokens != MASK).all() and (got.filled[0, 3:] >= 0).all()


# The loop --------------------------------------------------------------------


AGAIN = Remask(kind="cap", eta=0.3)


def test_rows_do_not_depend_on_their_batch():
  hot = Sampling(temperature=1.5)
  prompts = [(2, 5, 1), (0,), (6, 6, 6, 6), (3, 2)]
  for options in (
    dict(block=4, policy=Threshold(threshold=0.5)),
    dict(block=8, steps=4, select="random"),
    dict(block=4, policy=Threshold(threshold=0.5), edit=0.3),
    # Some rows change for longer than their planned steps, some do not.
    dict(block=4, edit=0.2, select="random", plan="chance", remask=AGAIN),
  ):
    whole = run(prompts, sampling=hot, **options)
    # The others' lengths decide about padding, so keep the longest one; and
    # as many of them, so that it is the same program.
    some = run(
      [prompts[2], prompts[1]] * 2,
      examples=jnp.array([2, 1, 0, 3]),
      sampling=hot,
      **options,
    )
    for a, b in ((0, 2), (1, 1)):
      np.testing.assert_array_equal(some.tokens[a], whole.tokens[b])
      assert some.counts[a] == whole.counts[b]


def test_ends():
  base = run(block=4)
  made = base.tokens[0, 3:]
  end = int(made[2])
  first = int(np.argmax(made == end))
  got = run(block=4, end=(end,))
  assert got.lengths[0] == first
  # What stands behind the end is no speed.
  assert got.tokens_per_call == first / 4
  assert (got.tokens[0, 3 + first :] == end).all()
  assert got.calls == 4  # the second block was never begun
  assert run(block=4, end=(end,), stop_early=False).calls == 8
  never = run(block=4, end=(end,), ends="never")
  assert not (never.tokens[0, 3:] == end).any()
  late = run(block=8, end=(end,), ends="last", stop_early=False)
  others = late.filled[0, 3:][late.tokens[0, 3:] != end]
  ends = late.filled[0, 3:][late.tokens[0, 3:] == end]
  assert others.max(initial=-1) < ends.min(initial=99)


def test_infilling_keeps_what_is_given():
  options = SamplerConfig(mask_id=MASK, length=8, block=8)
  tokens = np.array([[2, 5, 1, MASK, 4, MASK, MASK, 0]])
  state = sampler.begin(
    tokens, tokens == MASK, np.ones_like(tokens, bool), jax.random.key(0)
  )
  got = sampler.sample(Wave(), {}, state, options)
  np.testing.assert_array_equal(got.tokens[0, [0, 1, 2, 4, 7]], [2, 5, 1, 4, 0])
  assert (got.tokens != MASK).all() and got.calls == 3


@pytest.mark.slow
def test_edits_end():
  got = run(block=8, edit=0.5, policy=Threshold(threshold=0.3))
  plain = run(block=8, policy=Threshold(threshold=0.3))
  assert (got.tokens != MASK).all()
  full = got.filled.max() + 1
  assert plain.calls <= full <= 8 and got.calls <= full + 16
  # Where it stopped by itself, no other token is likely any more.
  options = SamplerConfig(mask_id=MASK, length=8, block=8)
  logits, _ = Wave().prefill({}, jnp.asarray(got.tokens), None, jnp.int32(3), 8)
  keys = jax.random.split(jax.random.key(0), 1)
  found, _, p = candidates(logits, keys, options, Sampling())
  wrong = (np.asarray(found) != got.tokens[:, 3:]) & (np.asarray(p) > 0.5)
  assert not wrong.any() or got.calls == full + 16


def test_the_caller_s_rows_are_the_caller_s():
  """Sampled again, or kept from block to block, they are what they were."""
  options = SamplerConfig(mask_id=MASK, length=8, block=4)
  state = sampler.start([[2, 5, 1]], options, jax.random.key(0))
  before, kept = jax.device_get(state.tokens), []
  first = sampler.sample(Wave(), {}, state, options, look=kept.append)
  again = sampler.sample(Wave(), {}, state, options)
  np.testing.assert_array_equal(again.tokens, first.tokens)
  np.testing.assert_array_equal(state.tokens, before)
  assert [int(x.calls) for x in kept] == [4, 8]
  np.testing.assert_array_equal(kept[0].tokens[0, :7], first.tokens[0, :7])
  # Rows may share arrays with the parameters.
  params = {"fixed": state.fixed}
  sampler.sample(Wave(), params, state, options)


# Laws of samplers, exactly ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Exact(Denoiser):
  """The joint distribution's own conditionals."""

  def prefill(self, params, tokens, valid, start, size):
    logits = joint.scores()(tokens)
    return jax.lax.dynamic_slice_in_dim(logits, start, size, axis=1), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


def law(n=20_000, **options):
  """Returns how often each of 81 sequences was drawn."""
  return frequencies(drawn(n, **options))


def drawn(n=20_000, **options):
  options = SamplerConfig(
    mask_id=joint.MASK, length=4, block=4, **{"steps": 4} | options
  )
  tokens = np.full((n, 4), joint.MASK)
  ones = np.ones_like(tokens, bool)
  state = sampler.begin(tokens, ones, ones, jax.random.key(5))
  return sampler.sample(
    Exact(), {}, state, options, sampling=Sampling(temperature=1.0)
  )


def frequencies(got):
  names = (got.tokens * 3 ** np.arange(4)[::-1]).sum(-1)
  return np.bincount(names, minlength=81) / len(names)


def variation(p, q):
  return 0.5 * np.abs(p - q).sum()


# Of 81 frequencies of 20,000 draws: half the sum of their mean deviations.
NOISE = 0.5 * np.sqrt(2 / np.pi / 20_000) * np.sqrt(joint.table()).sum()


@pytest.mark.slow
@pytest.mark.parametrize("select", ["random", "max", "margin", "entropy"])
@pytest.mark.sample(4)
def test_places_chosen_without_the_candidate_sample_the_joint(select):
  assert variation(law(select=select), joint.table()) < 1.5 * NOISE


@pytest.mark.slow
def test_places_by_chance_are_ancestral_steps():
  """The same law as `ancestral`, by the loop that blocks and caches have."""
  how = dict(select="random", plan="chance")
  few = law(steps=2, **how)
  want, _ = test_ancestral.law(ancestral.sample, ancestral.Ancestral(steps=2))
  noise = NOISE + test_ancestral.NOISE
  assert variation(few, want) < 1.5 * noise
  assert variation(few, joint.table()) > 0.1 + 1.5 * noise
  many = law(steps=64, **how)
  # Two of four places fall into one of 64 steps 6 / 64 of the time.
  assert variation(many, joint.table()) < 1.5 * NOISE + 0.1 * 0.39


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cap", "rescale", "confidence"])
@pytest.mark.sample(3)
def test_masking_again_is_remdm(kind):
  """The law of `ancestral`, and of the times at which places are filled."""
  again = Remask(kind=kind, eta=0.4)
  found = drawn(steps=3, select="random", plan="chance", remask=again)
  want, _ = test_ancestral.law(
    ancestral.sample, ancestral.Ancestral(steps=3, remask=again)
  )
  noise = NOISE + test_ancestral.NOISE
  assert variation(frequencies(found), want) < 1.5 * noise
  # A third is filled at first, and 0.4 of it masked again as half of the rest
  # is filled, or more, so that a third is masked; 4 errors of 80,000 places.
  share = np.bincount(found.filled.ravel(), minlength=3) / found.filled.size
  last = 1 / 3 + 2 / 15 if kind == "confidence" else 1 / 3
  np.testing.assert_allclose(share, (0.2, 0.8 - last, last), atol=0.007)


@pytest.mark.slow
def test_what_is_given_is_not_masked_again():
  """Every step is taken, by rows that have no mask for now as well."""
  rows = np.full((3, 6), MASK)
  rows[:, :2], rows[:, 4] = 1, 2
  masked = rows == MASK
  state = sampler.begin(rows, masked, np.ones_like(masked), jax.random.key(0))
  options = SamplerConfig(
    mask_id=MASK, length=6, block=6, steps=9, select="random", plan="chance",
    remask=Remask(kind="rescale", eta=1.0),
  )  # fmt: skip
  found = sampler.sample(Wave(), {}, state, options, Sampling(temperature=1.0))
  np.testing.assert_array_equal(found.tokens[~masked], rows[~masked])
  assert (found.tokens != MASK).all()
  assert found.calls == 9 and (found.counts == 9).all()
  np.testing.assert_array_equal(found.filled >= 0, masked)


def test_masking_again_needs_places_by_chance():
  with pytest.raises(
    UserError, match="remask=cap:0.1: plan=even fixes how many"
  ):
    SamplerConfig(mask_id=MASK, length=6, block=6, remask=Remask(eta=0.1))


def test_chance_needs_a_quota():
  with pytest.raises(
    UserError, match="plan=chance: policy=threshold:0.9 has no plan"
  ):
    SamplerConfig(
      mask_id=MASK, length=6, block=6, plan="chance", select="random",
      policy=Threshold(),
    )  # fmt: skip


def test_chance_needs_places_at_random():
  with pytest.raises(
    UserError, match="select=candidate: plan=chance fills pos"
  ):
    SamplerConfig(mask_id=8, length=6, block=6, plan="chance")


def test_tempered_confidences_are_of_what_is_drawn():
  """LLaDA 2: top-k, then top-p, at a temperature, in numpy."""
  rules = Sampling(temperature=0.7, top_k=4, top_p=0.8)
  logits = np.random.default_rng(0).normal(0, 2, (1, 6, 9)).astype(np.float32)
  base = SamplerConfig(mask_id=8, length=6, block=6)
  p = np.exp(logits[0, :, :8].astype(np.float64) / 0.7)
  kept = np.zeros_like(p)
  for row, out in zip(p, kept, strict=True):
    best = np.argsort(-row)[:4]
    share = row[best] / row[best].sum()
    n = 1 + int(np.searchsorted(np.cumsum(share), 0.8))
    out[best[:n]] = share[:n] / share[:n].sum()
  plain = np.exp(logits[0, :, :8].astype(np.float64))
  plain /= plain.sum(-1, keepdims=True)
  f = jax.jit(candidates, static_argnums=2)
  place = np.arange(6)
  for seed in range(20):
    keys = jax.random.split(jax.random.key(seed), 1)
    for tempered, truth in ((True, kept), (False, plain)):
      options = dataclasses.replace(base, tempered=tempered)
      found, sure, _ = f(jnp.asarray(logits), keys, options, rules)
      assert (kept[place, np.asarray(found[0])] > 0).all()
      want = truth[place, np.asarray(found[0])]
      np.testing.assert_allclose(sure[0], want, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "want"),
  [
    (dict(select="candidate"), 0.4036),
    (dict(steps=1), 0.3844),  # the product of marginals
  ],
)
def test_how_far_other_choices_are_from_the_joint(options, want):
  """research/diffusion/MATH.md 3.1, by exact enumeration there."""
  got = variation(law(**options), joint.table())
  assert abs(got - want) < 1.5 * NOISE


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(block=3), "block=3: does not divide length=8"),
    (dict(block=4, steps=3), "steps=3: expected a multiple of the 2 blocks"),
    (dict(end=(MASK,)), "holds the mask's id, 7; leave it out"),
  ],
)
def test_mistakes_in_options(options, message):
  with pytest.raises(UserError, match=message):
    SamplerConfig(mask_id=MASK, length=8, **{"block": 8} | options)


def test_settings_are_a_model_s_before_rows_are_filled():
  config = SamplerConfig(length=8)
  with pytest.raises(UserError, match="SamplerConfig.for_model returns them"):
    sampler.start([[1]], config, jax.random.key(0))
  ready = config.for_model(MASK, (1,), length=4)
  assert (ready.mask_id, ready.end, ready.block) == (MASK, (1,), 4)


def test_mistakes_in_prompts():
  with pytest.raises(UserError, match="prompt 2 holds the mask, id 7"):
    run([(1, 2), (3, MASK)], block=8)
  with pytest.raises(UserError, match="no prompts"):
    run([], block=8)


@pytest.mark.parametrize(
  ("sampling", "message"),
  [
    # Logits over 0 are infinite, those over -1 likeliest at the mask.
    (Sampling(temperature=0.0), "temperature: found 0.0"),
    (Sampling(temperature=-1.0), "temperature: found -1.0"),
    (Sampling(temperature=1.0, top_p=0.0), "top_p: found 0.0"),
    (Sampling(repetition_penalty=1.2), "repetition_penalty is 1.2"),
  ],
)
@pytest.mark.parametrize("canvas", [None, Growth(start=4)])
def test_mistakes_in_sampling(canvas, sampling, message):
  options = SamplerConfig(
    mask_id=MASK, length=8, block=8, canvas=canvas, end=(1,)
  )
  start, sample = sampler.start, sampler.sample
  if canvas is not None:
    start, sample = variable_length.start, variable_length.sample
  state = start([[2, 5, 1]], options, jax.random.key(0))
  with pytest.raises(UserError, match=message):
    sample(Wave(), {}, state, options, sampling)


def test_logits_that_are_no_numbers():
  @dataclasses.dataclass(frozen=True)
  class Broken(Wave):
    def prefill(self, params, tokens, valid, start, size):
      logits, carry = super().prefill(params, tokens, valid, start, size)
      return logits * jnp.nan, carry

  options = SamplerConfig(mask_id=MASK, length=8, block=8)
  state = sampler.start([[1]], options, jax.random.key(0))
  with pytest.raises(UserError, match="block at 1 are not finite"):
    sampler.sample(Broken(), {}, state, options)


def test_no_block_and_no_prompt_compiles_again():
  """Of one shape: other blocks, prompts, keys and temperatures."""
  hot = Sampling(temperature=0.5)
  run(block=4, sampling=hot)
  programs = sampler.fill_block._cache_size()
  for prompt, key in (((2, 5, 1), 1), ((6, 6, 0), 2), ((1, 0, 3), 3)):
    run(prompts=[prompt], block=4, key=key, sampling=hot)
  run(block=4, sampling=Sampling(temperature=1.5))
  assert sampler.fill_block._cache_size() == programs
  run(prompts=[(2, 5)], block=4, sampling=hot)  # a shorter row is another shape
  assert sampler.fill_block._cache_size() == programs + 1


@pytest.mark.slow
def test_weights_of_a_device_do_not_compile_again():
  """Rows are where the weights are from the first block on."""
  device = jax.devices()[1]
  params = jax.device_put({"w": np.ones(3)}, device)
  options = SamplerConfig(mask_id=MASK, length=8, block=2)
  state = sampler.start([[2, 5, 1, 3]], options, jax.random.key(0))
  programs = sampler.fill_block._cache_size()
  found = sampler.sample(Wave(), params, state, options)
  assert sampler.fill_block._cache_size() == programs + 1
  assert not np.any(found.tokens == MASK)
