"""Models conditioned on the time: which one, in training and in sampling."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion import likelihood
from research.diffusion.block import BlockDiffusion
from research.diffusion.learned import GenMD4, Rates
from research.diffusion.mask_ratio_time import MaskRatioTime
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling import ancestral, sampler
from research.diffusion.sampling.ancestral import Ancestral
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.sampling.policies import Threshold
from research.diffusion.schedule import Cosine, Linear, Power
from research.diffusion.variants import AnyOrder
from research.generation.sampling import Sampling, row_keys
from research.nn.time_embedding import TimeEmbedding
from research.typing import UserError
from tests import support
from tests.research.diffusion import joint, passes

V, T, K = 20, 12, 4
MASK = V - 1
TOLD = MaskRatioTime(mask_id=MASK)


@functools.cache
def network():
  model = support.model(
    depth=2,
    width=16,
    hidden=16,
    head_dim=8,
    heads=2,
    vocab=V,
    time_embedding=TimeEmbedding(features=8, hidden=8, width=8),
  )
  return model, support.params(model)


def rows(n=3):
  """Rows of two documents, 5 and 6 tokens, and padding."""
  tokens = np.random.default_rng(0).integers(0, MASK, (n, T))
  place = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, -1])
  segment = np.array([0] * 5 + [1] * 6 + [-1])
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
    "weights": jnp.ones((n, T)),
    "positions": jnp.broadcast_to(place, (n, T)),
    "segments": jnp.broadcast_to(segment, (n, T)),
  }


def close(got, want, tol=2e-5):
  scale = float(jnp.abs(want).max())
  chex.assert_trees_all_close(got, want, atol=tol * scale, rtol=0)


@pytest.mark.parametrize(
  "schedule", [Linear(), Linear(high=1e-3), Cosine(low=1e-3), Power(power=3.0)]
)
def test_times_of_shares_are_the_schedule_s(schedule):
  t = jnp.linspace(0.05, 0.95, 7)
  close(schedule.time(schedule.masked(t)), t, 1e-4)
  assert (
    schedule.time(jnp.array(1.0)) == 1 and schedule.time(jnp.zeros(())) == 0
  )


def test_shares_of_rows_and_blocks():
  tokens = jnp.array([[MASK, 1, MASK, MASK, 2, MASK], [MASK, 1, 2, 3, 4, 5]])
  valid = jnp.array([[False, *[True] * 5], [True] * 6])
  close(TOLD.rows(tokens, valid), jnp.array([3 / 5, 1 / 6]))
  want = [[2 / 3] * 4 + [1 / 2] * 2, [1 / 4] * 4 + [0] * 2]
  close(TOLD.blocks(tokens, valid, 4), jnp.array(want))


def cross_entropy(noisy, batch, mask, time):
  model, params = network()
  hidden, _ = model.apply(
    {"params": params}, noisy, batch["positions"], mask, time=time
  )
  logits = model.apply({"params": params}, hidden, method="logits")
  found = jax.nn.log_softmax(logits.at[..., MASK].set(-1e9))
  tokens = batch["tokens"][:, :T]
  return -jnp.take_along_axis(found, tokens[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize(
  "complement", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_each_document_is_told_its_time(complement):
  model, params = network()
  objective = MaskedDiffusion(
    model=model, mask_id=MASK, schedule=Linear(), complement=complement
  )
  batch, key = rows(), jax.random.key(5)
  loss = jax.jit(lambda: objective(params, batch, key)[0])()
  maskable = objective.maskable(batch)
  masked, counts = objective.draw(key, maskable, batch["segments"])
  # Of the linear schedule a token counts 1 / t.
  time = 1 / ((2 if complement else 1) * counts)
  first, second, pad = time[:, 0], time[:, 5], time[:, 11]
  assert (time[:, :5] == first[:, None]).all()
  assert (time[:, 5:11] == second[:, None]).all() and (first != second).all()
  if complement:
    batch = {k: jnp.concatenate([x, x]) for k, x in batch.items()}
  noisy = jnp.where(masked, MASK, batch["tokens"])
  mask = Mask.full(segments=batch["segments"])
  each = cross_entropy(noisy, batch, mask, time)
  want = jnp.where(masked, counts * each, 0).sum()
  np.testing.assert_allclose(loss, want, rtol=2e-5)
  del pad


@pytest.mark.slow
def test_each_block_is_told_its_time_and_clean_ones_0():
  model, params = network()
  objective = BlockDiffusion(model=model, mask_id=MASK, block=K)
  batch, key = rows(), jax.random.key(5)
  loss = jax.jit(lambda: objective(params, batch, key)[0])()
  maskable = objective.maskable(batch)
  masked, counts = objective.draw(key, maskable, batch["positions"])
  assert len(set(np.asarray(counts[0, :11]).tolist())) == 4

  def twice(x, y):
    return jnp.concatenate([x, y], axis=1)

  both = {k: twice(x, x) for k, x in batch.items()}
  noisy = jnp.where(masked, MASK, batch["tokens"])
  mask = Mask.block_diffusion(T, K, both["segments"], both["positions"])
  time = twice(1 / counts, jnp.zeros_like(counts))
  hidden, _ = model.apply(
    {"params": params},
    twice(noisy, batch["tokens"]),
    both["positions"],
    mask,
    time=time,
  )
  logits = model.apply({"params": params}, hidden[:, :T], method="logits")
  found = jax.nn.log_softmax(logits.at[..., MASK].set(-1e9))
  found = jnp.take_along_axis(found, batch["tokens"][..., None], -1)[..., 0]
  want = -jnp.where(masked, counts * found, 0).sum()
  np.testing.assert_allclose(loss, want, rtol=2e-5)


@pytest.mark.slow
def test_learned_schedules_tell_it_too():
  model, params = network()
  params = Rates(vocab=V)(params, jax.random.key(0))
  objective = GenMD4(model=model, mask_id=MASK)

  def loss(clock):
    return objective(params | {"clock": clock}, rows(), jax.random.key(0))[0]

  grads = jax.jit(jax.grad(loss))(params["clock"])
  assert all(float(jnp.abs(x).max()) > 1e-3 for x in jax.tree.leaves(grads))


def test_numbers_of_masks_have_no_time():
  model, params = network()
  with pytest.raises(UserError, match="expected MaskedDiffusion"):
    AnyOrder(model=model, mask_id=MASK)(params, rows(), jax.random.key(0))


# --- bounds and samplers that tell the process's own times ---


def hotter(tokens, time):
  """Returns the joint's conditionals, sharper the later it is."""
  return joint.scores()(tokens) * (0.3 + time)[:, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.sample(2)
def test_the_bound_has_times_of_its_masks(schedule):
  """Against all masks, and quadrature over times."""
  x = jnp.array([0, 1, 2, 0])
  sets = np.array(list(itertools.product([False, True], repeat=4)))[1:]
  nodes, sizes = np.polynomial.legendre.leggauss(24)
  total = 0.0
  shares = (nodes + 1) / 2
  f = jax.jit(
    lambda t: likelihood.values(
      hotter,
      x,
      jnp.ones(4, bool),
      jnp.asarray(sets),
      joint.MASK,
      jnp.full(len(sets), t),
    )
  )
  n = sets.sum(1)
  for share, size in zip(shares, sizes / 2, strict=True):
    # The integrand is sum over S of t^(n-1) (1-t)^(4-n) times CE.
    each = np.asarray(f(schedule.time(jnp.float32(share)))) * n / 4
    total += size * (share ** (n - 1) * (1 - share) ** (4 - n) * each).sum()
  got = likelihood.bound(
    jax.jit(hotter),
    x,
    jnp.ones(4, bool),
    joint.MASK,
    jax.random.key(0),
    samples=4096,
    batch=512,
    schedule=schedule,
  )
  assert abs(got.mean - total) < 4 * got.error
  # At the wrong times it is another number.
  cold = likelihood.bound(
    jax.jit(lambda z: hotter(z, jnp.ones(z.shape[0]))),
    x,
    jnp.ones(4, bool),
    joint.MASK,
    jax.random.key(0),
    samples=4096,
    batch=512,
  )
  assert abs(cold.mean - total) > 4 * (got.error + cold.error)


N, BINS = 500, 8


def telling(tokens, time):
  """Returns logits by which a place becomes the eighth of time it is told."""
  found = jnp.ceil(time * BINS).astype(jnp.int32) - 1
  chosen = jax.nn.one_hot(jnp.clip(found, 0, BINS - 1), BINS + 1) * 1e3
  return jnp.broadcast_to(chosen[:, None], (*tokens.shape, BINS + 1))


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize("way", ["ancestral", "first hitting"])
@pytest.mark.sample(3)
def test_samplers_tell_when_a_place_is_filled(way, schedule):
  """How often in each eighth is what the schedule says."""
  blank = jnp.full((N, 6), BINS, jnp.int32)
  keys = row_keys(jax.random.key(1), jnp.arange(N))

  @jax.jit
  def run():
    given = telling, blank, jnp.ones(blank.shape, bool), BINS, keys
    if way == "ancestral":
      how = Ancestral(steps=BINS, schedule=schedule)
      return ancestral.sample(*given, how, timed=True)[0]
    return ancestral.first_hitting(*given, schedule=schedule)[0]

  got = np.bincount(np.asarray(run()).ravel(), minlength=BINS)
  edges = np.asarray(schedule.masked(jnp.arange(BINS + 1) / BINS))
  want = 6 * N * np.diff(edges)
  # Each place's time has the schedule's law, whatever the others'.
  assert np.abs(got - want).max() < 4.5 * np.sqrt(want).max()


# --- denoisers, by shares of masks ---


def by_hand(tokens, valid, block, time):
  return passes.logits(*network(), tokens, valid, block, time)


@pytest.mark.slow
def test_caches_are_told_what_whole_rows_are():
  model, params = network()
  tokens = rows(2)["tokens"].at[:, 6:].set(MASK)
  valid = jnp.arange(T) >= jnp.array([2, 0])[:, None]
  changed = tokens.at[:, 9].set(5)
  at = jnp.int32(8)
  want = [
    by_hand(x, valid, None, jnp.array([a, b]))[:, 8:]
    for x, a, b in ((tokens, 6 / 10, 6 / 12), (changed, 5 / 10, 5 / 12))
  ]
  for d in (
    NoCache(model=model, time=TOLD),
    BlockCache(model=model, before=T, after=T, time=TOLD),
  ):

    @jax.jit
    def both(d=d):
      first, carry = d.prefill(params, tokens, valid, at, K)
      return first, d.step(params, changed, valid, at, K, carry)[0]

    for got, right in zip(both(), want, strict=True):
      close(got, right)


@pytest.mark.slow
def test_a_block_causal_cache_is_told_what_whole_rows_are():
  model, params = network()
  tokens = rows(2)["tokens"].at[:, 4:].set(MASK)
  valid = jnp.ones(tokens.shape, bool)
  filled = tokens.at[:, 4:8].set(3)
  changed = filled.at[:, 9].set(5)
  whole = NoCache(model=model, block=K, time=TOLD)
  d = BlockCausal(model=model, block=K, time=TOLD)

  @jax.jit
  def run():
    memory = d.cache_finished(params, tokens, valid, jnp.int32(4), K)
    first, memory = d.step(params, tokens, valid, jnp.int32(4), K, memory)
    at = params, filled, valid, jnp.int32(8), K
    memory = d.cache_finished(*at, memory)
    return first, d.step(params, changed, *at[2:], memory)[0]

  first, second = run()
  close(first, whole.prefill(params, tokens, valid, jnp.int32(4), K)[0])
  want = whole.prefill(params, changed, valid, jnp.int32(8), K)[0]
  close(second, want)
  time = jnp.broadcast_to(jnp.repeat(jnp.array([0, 0, 0.75]), K), (2, T))
  close(second, by_hand(changed, valid, K, time)[:, 8:])


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch():
  model, params = network()
  options = SamplerConfig(
    mask_id=MASK, length=8, block=K, policy=Threshold(threshold=0.15)
  )
  prompts, key = [[3, 1, 4], [5, 9], [2, 6, 5]], jax.random.key(1)
  d = BlockCache(model=model, time=TOLD)
  warm = Sampling(temperature=1.0)
  state = sampler.start(prompts, options, key)
  batch = sampler.sample(d, params, state, options, warm)
  for i in (0, 2):
    state = sampler.start([prompts[i]], options, key, jnp.array([i]))
    alone = sampler.sample(d, params, state, options, warm)
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[i])
  assert not (batch.tokens == MASK).any()
