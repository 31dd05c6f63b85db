"""Estimates of log p: what a view is worth, and what a model sees of it."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.diffusion.alignment import estimators
from research.diffusion.alignment.estimators import Coupled, Elbo, FullMask
from research.diffusion.schedule import Cosine
from research.generation.sampling import row_keys
from research.nn.time_embedding import TimeEmbedding
from research.typing import UserError
from tests import support
from tests.research.diffusion import passes
from tests.research.diffusion.alignment.test_preference import (
  MASK,
  T,
  V,
  network,
  rows,
)


@pytest.mark.parametrize(
  "how", [FullMask(prompt=0.3), Coupled(), Elbo(times=3, masks=2)], ids=str
)
def test_every_token_counts_once_in_expectation(how):
  n, length = 20_000, 3
  keys = row_keys(jax.random.key(0), jnp.arange(n))
  answer = jnp.broadcast_to((jnp.arange(T) >= 4) & (jnp.arange(T) < 7), (n, T))
  views = jax.jit(how.plan)(keys, answer, jnp.ones((n, T), bool))
  masked, counts = (np.asarray(x) for x in (views.masked, views.counts))
  total = counts.sum(0)
  assert not (counts > 0)[~masked].any()
  assert (total[:, :4] == 0).all() and (total[:, 7:] == 0).all()
  found = total[:, 4:7]
  # The authors halve a sum whose second part is a token's mask or complement.
  want = 1.5 if isinstance(how, Coupled) else 1.0
  error = found.std(0) / n**0.5
  assert (error < 0.004).all()
  assert (np.abs(found.mean(0) - want) <= 4.5 * error).all()
  if isinstance(how, Elbo):
    # L/n of n tokens, whatever n: the sum over tokens is no matter of chance,
    # and so it is enough that numbers, and sets of a number, are uniform.
    np.testing.assert_allclose(found.sum(-1), length, rtol=1e-6)
    each = masked[..., 4:7].reshape(-1, how.masks, n, length)[:, 0]
    sets = (each * [1, 2, 4]).sum(-1).ravel()
    size = each.sum(-1).ravel()
    for number in range(1, length + 1):
      assert close_share(size == number, 1 / 3)
      names = np.unique(sets[size == number])
      assert len(names) == math.comb(length, number)
      for name in names:
        assert close_share(sets[size == number] == name, 1 / len(names))
  if isinstance(how, Coupled):
    assert (found > 0.5).all()
    share = np.asarray(views.share)[1:, :, None]
    np.testing.assert_allclose((counts[1:] * share)[masked[1:]], 0.5, rtol=1e-5)
    # Less what each is worth: no number is left but the coin's.
    coins = masked[1, :, 4:7] - share[0]
    assert abs(coins.mean()) < 4.5 * coins.std() / coins.size**0.5
  if isinstance(how, FullMask):
    np.testing.assert_array_equal(found, 1.0)
    assert close_share(masked[0, :, :4], 0.3)


def close_share(hits, want):
  """Whether independent hits are as many as `want` says, within 4.5 errors."""
  return abs(hits.mean() - want) <= 4.5 * (want * (1 - want) / hits.size) ** 0.5


def own(logits, tokens):
  """Returns log p of each token `[B, T]`, the mask having no probability."""
  z = np.array(logits, np.float64)
  z[..., MASK] = -np.inf
  top = z.max(-1, keepdims=True)
  logp = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
  return np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0]


def summed(views, each):
  """Returns estimates `[B, T]`: `each` of a view's masks, times its counts."""
  total = 0.0
  for i, (masked, counts) in enumerate(
    zip(np.asarray(views.masked), np.asarray(views.counts), strict=True)
  ):
    total = total + np.where(counts > 0, counts * each(i, masked), 0)
  return total


ESTIMATE = jax.jit(
  estimators.estimate,
  static_argnums=0,
  static_argnames=("mask_id", "shift", "block", "schedule"),
)


def test_estimates_are_log_probabilities_of_the_views():
  """Without the mask, as in the sampler and in the bound."""
  model, params = network()
  tokens, valid, answer = rows()
  keys = row_keys(jax.random.key(1), jnp.arange(4))
  views = Elbo(times=2).plan(keys, answer & valid, valid)
  got = ESTIMATE(model, params, tokens, valid, views, mask_id=MASK)

  def each(i, masked):
    noisy = np.where(masked, MASK, tokens)
    return own(passes.logits(model, params, noisy, valid, None), tokens)

  chex.assert_trees_all_close(got, summed(views, each), atol=1e-5)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.sample(2)
def test_blocks_see_clean_blocks_before_them(shift):
  """Of each block in turn, noisy after clean ones: what its bound is made of.

  An answer of a block and a half, whose first block holds the prompt's end; a
  row is padded by a whole block. What a view hides of the prompt is hidden of
  later blocks, too.
  """
  model, params = network()
  size, length = 4, 16
  tokens = np.random.default_rng(0).integers(0, MASK, (2, length))
  valid = np.arange(length) >= np.array([[0], [size]])
  answer = (np.arange(length) >= 6) & (np.arange(length) < 14)
  answer = np.broadcast_to(answer, valid.shape)
  keys = row_keys(jax.random.key(1), jnp.arange(2))
  given = jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)
  for how in (FullMask(prompt=0.4), Coupled()):
    views = how.plan(keys, jnp.asarray(answer), given[1])
    got = ESTIMATE(
      model, params, *given, views, mask_id=MASK, shift=shift, block=size
    )

    def each(i, masked):
      shown = np.where(masked & ~answer, MASK, tokens)
      found = np.zeros(tokens.shape)
      for start in range(0, length, size):
        inside = slice(start, start + size)
        row = shown.copy()
        row[:, inside] = np.where(masked, MASK, tokens)[:, inside]
        z = passes.logits(model, params, row, valid, size)
        if shift:
          z = np.concatenate([z[:, :1], z[:, :-1]], 1)
        found[:, inside] = own(z, tokens)[:, inside]
      return found

    chex.assert_trees_all_close(got, summed(views, each), atol=1e-5)


CLOCK = TimeEmbedding(features=8, hidden=8, width=8)


@pytest.mark.parametrize("block", [4, None])
@pytest.mark.sample(2)
def test_a_model_with_a_time_gets_the_process_s(block):
  """That of each view; 0 for clean blocks."""
  model = support.model(
    depth=2,
    width=16,
    hidden=16,
    head_dim=8,
    heads=2,
    vocab=V,
    time_embedding=CLOCK,
  )
  params, schedule = support.params(model), Cosine()
  tokens = np.random.default_rng(0).integers(0, MASK, (2, 12))
  valid = np.ones(tokens.shape, bool)
  answer = np.broadcast_to(np.arange(12) >= 5, tokens.shape)
  keys = row_keys(jax.random.key(1), jnp.arange(2))
  given = jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)
  views = Elbo(times=2).plan(keys, jnp.asarray(answer), given[1])
  got = ESTIMATE(
    model, params, *given, views, mask_id=MASK, block=block, schedule=schedule
  )
  # alpha = 1 - sin(pi t / 2), whose inverse is this.
  times = np.arcsin(np.asarray(views.share, np.float64)) * 2 / np.pi
  size = block or 12

  def each(i, masked):
    found = np.zeros(tokens.shape)
    for start in range(0, 12, size):
      inside = slice(start, start + size)
      row, time = tokens.copy(), np.zeros(tokens.shape)
      row[:, inside] = np.where(masked, MASK, tokens)[:, inside]
      time[:, inside] = times[i][:, None]
      z = passes.logits(model, params, row, valid, block, time)
      found[:, inside] = own(z, tokens)[:, inside]
    return found

  want = summed(views, each)
  chex.assert_trees_all_close(got, want, atol=2e-5 * np.abs(want).max())


def test_times_of_views_have_the_process_s_law():
  """Of n masks of L, Beta(n, L - n + 1), whichever tokens those are."""
  n, length = 4000, 5
  keys = row_keys(jax.random.key(3), jnp.arange(n))
  answer = jnp.ones((n, length), bool)
  views = jax.jit(Elbo(times=1).plan)(keys, answer, answer)
  masked, share = np.asarray(views.masked[0]), np.asarray(views.share[0])
  number = masked.sum(-1)
  # A uniform number if the law is right: Kolmogorov's distance of all of them.
  level = stats.beta.cdf(share, number, length - number + 1)
  assert stats.kstest(level, "uniform").pvalue > 1e-4
  for place in range(length):
    assert stats.kstest(level[masked[:, place]], "uniform").pvalue > 1e-4
  full = FullMask().plan(keys, answer, answer)
  np.testing.assert_array_equal(full.share, 1.0)
  both = jax.jit(Coupled().plan)(keys, answer, answer)
  np.testing.assert_array_equal(both.share[0], 1.0)
  some, rest = np.asarray(both.share[1:])
  np.testing.assert_allclose(some + rest, 1.0, rtol=1e-6)
  assert (some >= 0.2).all() and (some <= 0.8).all()
  hidden = np.asarray(both.masked[1]).mean(-1) - some
  assert abs(hidden.mean()) < 4 * 0.5 / (n * length) ** 0.5


def test_a_block_has_tokens():
  model, params = network()
  tokens, valid, answer = rows()
  keys = row_keys(jax.random.key(1), jnp.arange(4))
  views = FullMask().plan(keys, answer, valid)
  with pytest.raises(UserError, match="block is 0, expected at least 1"):
    estimators.estimate(model, params, tokens, valid, views, MASK, block=0)
