"""Estimates, VRPO and GRPO: exact variances, and where they meet DPO."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import Coupled, Elbo
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.preference import VRPO
from research.diffusion.sampling import denoiser
from research.diffusion.schedule import Cosine
from research.training.alignment.surrogate import grpo
from research.typing import UserError
from tests import support
from tests.research.diffusion import joint

V, T = 20, 10  # of 8 booleans LLVM may fail to make a vector
MASK = V - 1


@functools.cache
def network(seed=0):
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
  params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
  return model, params["params"]


# The variances of VRPO, exactly ----------------------------------------------

SETS = [
  (n, chosen)
  for n in range(1, 5)
  for chosen in itertools.combinations(range(4), n)
]


def score(strength):
  """Returns by number of masks the values of every set, `[4, sets]`."""
  known = joint.conditionals(strength)
  x = (0, 1, 2, 0)
  out = {n: [] for n in range(1, 5)}
  for n, chosen in SETS:
    row = [joint.MASK if i in chosen else x[i] for i in range(4)]
    index = int((np.array(row) * 4 ** np.arange(4)[::-1]).sum())
    out[n].append(4 / n * sum(known[index, i, x[i]] for i in chosen))
  return [np.array(v) for v in out.values()]


def split(values, n_t, n_y):
  """Returns the variance of a mean over n_t numbers and n_y sets of each."""
  within = np.mean([v.var() for v in values])
  between = np.var([v.mean() for v in values])
  return between / n_t + within / (n_t * n_y)


N = 60_000


@functools.cache
def drawn(n_t, n_y, seed=0):
  """Returns estimates of log p by N plans of `Elbo`, policy and reference."""
  keys = jax.random.split(jax.random.key(seed), N)
  every = jnp.ones((N, 4), bool)
  views = jax.jit(Elbo(times=n_t, masks=n_y).plan)(keys, every, every)
  x = np.array([0, 1, 2, 0])
  found = []
  for strength in (2.2, 2.0):
    known, total = joint.conditionals(strength), 0.0
    for masked, counts in zip(views.masked, views.counts, strict=True):
      rows = np.where(masked, joint.MASK, x)
      each = known[(rows * 4 ** np.arange(4)[::-1]).sum(-1)]
      each = each[:, np.arange(4), x]
      total = total + (np.where(masked, counts, 0) * each).sum(-1)
    found.append(total)
  return found


def close_variance(found, want):
  """Whether a sample's variance is `want`, within 4.5 of its errors."""
  apart = (found - found.mean()) ** 2
  assert abs(apart.mean() - want) < 4.5 * apart.std() / np.sqrt(N)
  assert apart.std() / np.sqrt(N) < 0.05 * want


@pytest.mark.parametrize(
  ("n_t", "n_y", "want"),
  [
    (1, 1, 0.412511),
    (4, 1, 0.103128),
    (2, 2, 0.205901),
    (1, 4, 0.411446),
    (8, 1, 0.051564),
  ],
)
@pytest.mark.sample(3)
def test_variances_of_budgets(n_t, n_y, want):
  """research/diffusion/MATH.md 6.2: strengths 2.2 and 2, masks shared."""
  policy, reference = drawn(n_t, n_y)
  apart = policy - reference
  close_variance(apart, want)
  error = apart.std() / np.sqrt(N)
  assert abs(apart.mean() + 0.348950) < 4.5 * error
  # The same by enumeration.
  scores = zip(score(2.2), score(2.0), strict=True)
  assert split([a - b for a, b in scores], n_t, n_y) == pytest.approx(
    want, abs=1e-6
  )


def test_variance_of_masks_that_are_not_shared():
  apart = drawn(1, 1)[0] - drawn(1, 1, seed=1)[1]
  close_variance(apart, 61.465454)
  independent = split(score(2.2), 1, 1) + split(score(2.0), 1, 1)
  assert independent == pytest.approx(61.465454, abs=1e-5)


def rows(n=4):
  tokens = np.random.default_rng(0).integers(0, MASK, (n, T))
  valid = np.arange(T) >= np.arange(n)[:, None] % 2
  answer = (np.arange(T) >= 4) & (np.arange(T) < 7)
  answer = np.broadcast_to(answer, valid.shape)
  return (
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(valid),
    jnp.asarray(answer),
  )


# VRPO ------------------------------------------------------------------------


def pairs(length=1):
  tokens = np.random.default_rng(1).integers(0, MASK, (3, 2, T))
  weights = np.zeros((3, 2, T), np.float32)
  weights[..., 3 : 3 + length] = 1
  place = np.broadcast_to(np.arange(T), tokens.shape)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(np.roll(tokens, -1, -1), jnp.int32),
    "weights": jnp.asarray(weights),
    "positions": jnp.asarray(place),
    "segments": jnp.zeros(tokens.shape, jnp.int32),
  }


@pytest.mark.slow
def test_where_the_bound_is_exact_it_is_dpo():
  """An answer of one token: one mask, and its exact log-probability."""
  model, policy = network(0)
  _, reference = network(1)
  batch = pairs()
  ours = VRPO(model=model, mask_id=MASK, estimator=Elbo(times=3), beta=0.7)

  def logp(params):
    tokens = batch["tokens"].reshape(6, T)
    noisy = tokens.at[:, 4].set(MASK)
    logits = denoiser.NoCache(model=model).scores(
      params, noisy, jnp.ones((6, T), bool)
    )
    # The mask has no probability.
    found = jax.nn.log_softmax(logits[:, 4, :MASK])
    return jnp.take_along_axis(found, tokens[:, 4:5], -1).reshape(3, 2)

  def dpo(params):
    ratio = logp(params) - logp(reference)
    return -jax.nn.log_sigmoid(0.7 * (ratio[:, 0] - ratio[:, 1])).sum()

  def vrpo(params):
    tree = dict(params) | {"reference": reference}
    return ours(tree, batch, jax.random.key(0))[0]

  got, want = (jax.jit(jax.value_and_grad(f))(policy) for f in (vrpo, dpo))
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shared_masks_cost_less_noise():
  model, policy = network(0)
  reference = jax.tree.map(lambda x: x * 1.01, policy)
  batch = pairs(4)

  def spread(shared):
    ours = VRPO(
      model=model, mask_id=MASK, estimator=Elbo(times=1), shared=shared
    )
    f = jax.jit(
      lambda k: ours(dict(policy) | {"reference": reference}, batch, k)[2]
    )
    found = [float(f(jax.random.key(i))["margin"]) for i in range(24)]
    return np.var(found)

  assert spread(True) < 0.01 * spread(False)


@pytest.mark.slow
def test_objectives_ask_as_they_are_told(monkeypatch):
  """Of the model's blocks, at the schedule's times."""
  model, params = network()
  real, seen = inspect.signature(estimators.estimate), []

  def estimate(*given):
    seen.append(real.bind(*given).arguments)
    return jnp.zeros(given[2].shape)

  monkeypatch.setattr(estimators, "estimate", estimate)
  how = dict(model=model, mask_id=MASK, shift=True, block=5, rows=7)
  how["schedule"] = Cosine()
  VRPO(**how)(dict(params) | {"reference": params}, pairs(), jax.random.key(0))
  GRPO(**how).estimate(params, *rows(), jnp.arange(4))
  assert len(seen) == 3
  for given in seen:
    assert {name: given[name] for name in how} == how


# GRPO ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_ratio_is_one_and_the_gradient_is_the_policy_s():
  model, params = network()
  tokens, valid, answer = rows()
  answer = answer & valid
  seed = jnp.array([5, 6, 7, 8])
  how = GRPO(model=model, mask_id=MASK, surrogate=grpo(clip=0.5, beta=0.0))
  estimate = jax.jit(how.estimate)
  old = estimate(params, tokens, valid, answer, seed)
  advantage = jnp.array([1.0, -0.5, 0.25, 0.0])
  batch = dict(
    tokens=tokens,
    valid=valid,
    answer=answer,
    seed=seed,
    advantage=advantage,
    old=old,
    reference=old,
  )
  loss, count, sums = jax.jit(how)(params, batch, None)
  assert float(count) == 4
  np.testing.assert_allclose(sums["ratio"] / count, 1, rtol=1e-6)
  np.testing.assert_allclose(loss, -advantage.sum(), rtol=1e-5)

  def surrogate(params):
    new = how.estimate(params, tokens, valid, answer, seed)
    mean = jnp.where(answer, new, 0).sum(-1) / answer.sum(-1)
    return -(advantage * mean).sum()

  got = jax.jit(jax.grad(lambda p: how(p, batch, None)[0]))(params)
  want = jax.jit(jax.grad(surrogate))(params)
  chex.assert_trees_all_close(got, want, atol=1e-6)
  # Masks follow the seed, not the place in the batch.
  turned = estimate(params, tokens[::-1], valid[::-1], answer[::-1], seed[::-1])
  chex.assert_trees_all_close(turned[::-1], old, atol=1e-6)


@pytest.mark.slow
def test_far_ratios_have_no_gradient_and_divergence_pulls_back():
  model, params = network()
  tokens, valid, answer = rows()
  how = GRPO(model=model, mask_id=MASK, surrogate=grpo(clip=0.5, beta=0.0))
  seed = jnp.arange(4)
  now = jax.jit(how.estimate)(params, tokens, valid, answer, seed)
  batch = dict(
    tokens=tokens,
    valid=valid,
    answer=answer,
    seed=seed,
    advantage=jnp.ones(4),
    old=now - 1.0,
    reference=now,
  )
  grads = jax.jit(jax.grad(lambda p: how(p, batch, None)[0]))(params)
  assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) == 0
  # A fallen ratio of a good answer is not clipped: it counts in full.
  loss, count, _ = jax.jit(how)(params, batch | {"old": now + 1.0}, None)
  np.testing.assert_allclose(loss / count, -np.exp(-1.0), rtol=1e-5)
  pulled = GRPO(model=model, mask_id=MASK, surrogate=grpo(clip=0.5, beta=1.0))
  batch |= {"reference": now + 0.5}
  _, count, sums = jax.jit(pulled)(params, batch, None)
  want = np.exp(0.5) - 0.5 - 1
  np.testing.assert_allclose(sums["divergence"] / count, want, rtol=1e-5)


def test_mistakes():
  with pytest.raises(UserError, match="low is 0.0 and high 0.8"):
    Coupled(low=0.0)
