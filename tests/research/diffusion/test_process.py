"""Schedules, times and masks: published numbers, laws, and exact sums."""

import dataclasses
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.diffusion import process
from research.diffusion.schedule import Cosine, Linear, Power
from research.generation.sampling import row_keys
from research.typing import UserError

# research/diffusion/MATH.md 2.2, 2.3: MDLM's log-linear noise, MD4's schedules.
WEIGHTS = [
  (Linear(low=1e-4, high=1e-4), 0.0, 9998.0),
  (Linear(low=1e-4, high=1e-4), 0.25, 3.9984),
  (Linear(low=1e-4, high=1e-4), 0.5, 1.9996),
  (Linear(low=1e-4, high=1e-4), 1.0, 0.9999),
  (Cosine(low=1e-4, high=1e-4), 0.0, 15704.82),
  (Cosine(low=1e-4, high=1e-4), 0.25, 3.7912),
  (Cosine(low=1e-4, high=1e-4), 0.5, 1.5706),
  (Cosine(low=1e-4, high=1e-4), 1.0, 0.0),
  (Linear(low=1e-3), 0.25, 4.0),
  (Linear(low=1e-3), 0.5, 2.0),
  (Linear(low=1e-3), 1.0, 1.0),
]


@pytest.mark.parametrize(("schedule", "t", "want"), WEIGHTS)
def test_weights_are_the_published_ones(schedule, t, want):
  got = float(schedule.weight(jnp.float32(t)))
  assert got == pytest.approx(want, rel=2e-4, abs=1e-6)


SCHEDULES = [
  Linear(high=1e-3),
  Cosine(low=1e-4, high=1e-4),
  Power(power=2.0),
  Power(power=0.5, low=0.01),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_slopes_are_derivatives(schedule):
  t = jnp.linspace(0.05, 0.95, 7)
  slope = jax.vmap(jax.grad(schedule.alpha))(t)
  chex.assert_trees_all_close(schedule.slope(t), slope, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(
    schedule.alpha(t) + schedule.masked(t), jnp.ones(7), rtol=1e-6
  )


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Power(power=2.0)])
@pytest.mark.parametrize(("length", "n"), [(4, 1), (4, 3), (7, 7)])
def test_every_schedule_weighs_a_set_of_masks_alike(schedule, length, n):
  """The coefficient identity: 1 / (n C(L, n)), whatever the schedule."""
  # Midpoints in sqrt(t), which tames the cosine's slow start.
  u = (np.arange(200_000) + 0.5) / 200_000
  t = jnp.asarray(u**2)
  with jax.enable_x64(True):
    t = jnp.asarray(u**2, jnp.float64)
    p = schedule.masked(t)
    inside = schedule.weight(t) * p**n * (1 - p) ** (length - n)
    got = float(jnp.sum(inside * 2 * u) / len(u))
  assert got == pytest.approx(1 / (n * math.comb(length, n)), rel=1e-4)


@pytest.mark.parametrize("spread", ["independent", "even"])
def test_times_are_uniform(spread):
  keys = jax.random.split(jax.random.key(0), 500)
  t = jax.vmap(lambda k: process.times(k, 8, spread))(keys)
  assert float(t.min()) > 0 and float(t.max()) <= 1
  # Of 4000 uniform numbers the mean errs by 1 / sqrt(12 4000) = 0.0046.
  assert abs(float(t.mean()) - 0.5) < 4 * 0.0046
  if spread == "even":
    ordered = jnp.sort(t, axis=-1)
    chex.assert_trees_all_close(
      jnp.diff(ordered, axis=-1), jnp.full((500, 7), 1 / 8), atol=1e-6
    )


def test_masks_do_not_depend_on_the_batch():
  maskable = jnp.ones((6, 9), bool)
  key, rate = jax.random.key(3), jnp.full((6, 1), 0.4)
  keys = row_keys(key, jnp.arange(6))
  whole = process.mask_each(keys, maskable, rate)
  some = process.mask_each(keys[2:4], maskable[2:4], rate[2:4])
  chex.assert_trees_all_equal(whole[2:4], some)
  whole = process.mask_count(keys, maskable, jnp.arange(6))
  some = process.mask_count(keys[2:4], maskable[2:4], jnp.arange(2, 4))
  chex.assert_trees_all_equal(whole[2:4], some)


def test_only_what_may_be_is_masked_and_exactly_so_many():
  maskable = jnp.arange(8) >= jnp.array([[3], [0], [6]])
  keys = row_keys(jax.random.key(0), jnp.arange(3))
  count = jnp.array([4, 8, 1])
  got = process.mask_count(keys, maskable, count)
  chex.assert_trees_all_equal(got.sum(-1), count)
  assert not (got & ~maskable).any()
  got = process.mask_each(keys, maskable, jnp.ones((3, 1)))
  chex.assert_trees_all_equal(got, maskable)


def test_every_set_of_masks_is_as_likely():
  n = 6000
  keys = row_keys(jax.random.key(1), jnp.arange(n))
  got = process.mask_count(keys, jnp.ones((n, 4), bool), jnp.full(n, 2))
  names = np.asarray(got) @ (1 << np.arange(4))
  want = [sum(1 << i for i in c) for c in itertools.combinations(range(4), 2)]
  counts = np.array([(names == w).sum() for w in want])
  # Chi-squared with 5 degrees of freedom: 20.5 at one in a thousand.
  assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 20.5
  assert counts.sum() == n


def test_images_are_never_masked():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Images(weights.WrappedWeight):
    w: Any
    extra_ids = (9, 7)

  tokens, may = jnp.array([[9, 7, 5], [1, 9, 2]]), jnp.ones((2, 3), bool)
  may = may.at[1, 2].set(False)
  table = jnp.zeros((6, 2))
  found = process.without_images({"embed": Images(table)}, tokens, may)
  np.testing.assert_array_equal(found, [[0, 0, 1], [1, 0, 0]])
  same = process.without_images({"embed": table}, tokens, may)
  np.testing.assert_array_equal(same, may)


def test_mistakes():
  with pytest.raises(UserError, match="mask_id: found -1, expected the id"):
    process.noisy(jnp.zeros((1, 2), int), jnp.ones((1, 2), bool), -1)
  with pytest.raises(UserError, match="low is 0.6 and high 0.5"):
    Linear(low=0.6, high=0.5)
