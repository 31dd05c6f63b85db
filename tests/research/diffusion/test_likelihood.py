"""Likelihood bounds against enumeration of a small joint distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion import likelihood
from research.typing import UserError
from tests.research.diffusion import joint

X = jnp.array([0, 1, 2, 0])
ALL = jnp.ones(4, bool)


def masks(n):
  rows = [
    [i in chosen for i in range(4)]
    for chosen in itertools.combinations(range(4), n)
  ]
  return jnp.array(rows)


@pytest.mark.parametrize(
  ("x", "want"),
  [
    ((0, 1, 2, 0), 7.312644),
    ((2, 2, 2, 2), 4.039187),
    ((1, 0, 1, 2), 3.486773),
  ],
)
def test_the_joint_is_the_specifications(x, want):
  assert joint.minus_log(x) == pytest.approx(want, abs=1e-6)


def by_count(x, strength=2.0):
  """Returns the values of every set of n masks, for n = 1..4."""
  scores = joint.scores(strength)
  f = jax.jit(
    lambda m: likelihood.values(scores, jnp.asarray(x), ALL, m, joint.MASK)
  )
  return [np.asarray(f(masks(n)), np.float64) for n in range(1, 5)]


def test_values_by_number_of_masks():
  """research/diffusion/MATH.md 6.2; their mean is -log p(x)."""
  means = [v.mean() for v in by_count(X)]
  want = [16.260486, 4.859053, 4.271410, 3.859627]
  np.testing.assert_allclose(means, want, rtol=2e-6)
  np.testing.assert_allclose(np.mean(means), 7.312644, rtol=2e-6)


@pytest.mark.slow
def test_the_bound_is_tight_everywhere():
  for x in joint.SEQUENCES[::5]:
    got = np.mean([v.mean() for v in by_count(tuple(x))])
    assert got == pytest.approx(joint.minus_log(x), rel=1e-5)


def test_the_variance_of_one_sample():
  found = by_count(X)
  second = np.mean([(v**2).mean() for v in found])
  assert second - 7.312644**2 == pytest.approx(27.199260, rel=1e-5)


def test_a_uniform_model_needs_no_samples():
  def flat(tokens):
    return jnp.zeros((*tokens.shape, 3))

  got = likelihood.bound(flat, X, ALL, joint.MASK, jax.random.key(0), 8, 8)
  assert got.mean == pytest.approx(4 * np.log(3), rel=1e-6)
  assert got.error == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_estimates_are_within_their_errors():
  """Two rows of the joint as one: 255 sets of masks, of which 128 are drawn."""
  scores = joint.scores()

  @jax.jit
  def twice(tokens):
    return jnp.concatenate([scores(tokens[:, :4]), scores(tokens[:, 4:])], 1)

  x, target = jnp.concatenate([X, X]), jnp.ones(8, bool)
  means, errors = [], []
  for i in range(16):
    got = likelihood.bound(twice, x, target, joint.MASK, jax.random.key(i), 128)
    assert got.samples == 128
    means.append(got.mean)
    errors.append(got.error)
  error = np.sqrt(np.square(errors).sum()) / 16
  assert abs(np.mean(means) - 2 * 7.312644) < 4 * error
  # What is called a standard error is one.
  assert 0.5 < np.std(means, ddof=1) / np.mean(errors) < 2


def test_few_sets_of_masks_are_enumerated():
  scores, key = jax.jit(joint.scores()), jax.random.key(1)
  got = likelihood.bound(scores, X, ALL, joint.MASK, key, 16)
  assert (got.error, got.samples) == (0.0, 15)
  assert got.mean == pytest.approx(7.312644, rel=2e-6)
  # Given the first two tokens: any batch, that does not divide the sets too.
  target = jnp.array([False, False, True, True])
  rows = (joint.SEQUENCES[:, :2] == [0, 1]).all(-1)
  want = joint.minus_log(X) + np.log(joint.table()[rows].sum())
  for batch in (1, 2, 16):
    got = likelihood.exact(scores, X, target, joint.MASK, batch)
    assert (got.samples, got.error) == (3, 0.0)
    assert got.mean == pytest.approx(want, rel=1e-5)
  # One set more than samples: drawn.
  got = likelihood.bound(scores, X, ALL, joint.MASK, key, 14, 2)
  assert got.samples == 14 and got.error > 0


def rounded(first, length, batch, rounding):
  """Returns the rule's numbers of masks, in Python's arithmetic."""
  step = [
    j * length // batch if rounding == "floor" else j * length / batch
    for j in range(batch)
  ]
  # Python rounds halves to even, as torch does.
  return [(round(first + s) - 1) % length + 1 for s in step]


def distribution(length, batch, rounding):
  """Returns how often each number of masks comes, over all first draws."""
  seen = np.zeros(length)
  for first in range(1, length + 1):
    found = rounded(first, length, batch, rounding)
    seen += np.bincount(found, minlength=length + 1)[1:]
  return seen / seen.sum() * length


@pytest.mark.parametrize(
  ("length", "batch", "low", "high"),
  [
    *((8, 16, 0.5, 1.5), (24, 16, 0.5, 1.5), (6, 4, 0.5, 1.5)),
    *((12, 16, 0.75, 1.25), (20, 16, 0.75, 1.25), (16, 8, 1, 1)),
  ],
)
@pytest.mark.sample(5)
def test_numbers_of_masks_are_uniform_only_rounded_down(
  length, batch, low, high
):
  """research/diffusion/MATH.md 4.1: LLaDA's rule prefers some, ours none."""
  biased = distribution(length, batch, "half_even")
  assert (biased.min(), biased.max()) == (low, high)
  np.testing.assert_array_equal(distribution(length, batch, "floor"), 1)
  for rounding in ("floor", "half_even"):
    f = jax.jit(lambda k, r=rounding: likelihood.counts(k, length, batch, r))
    got = {tuple(np.asarray(f(jax.random.key(i))).tolist()) for i in range(60)}
    assert got <= {
      tuple(rounded(first, length, batch, rounding))
      for first in range(1, length + 1)
    }
    assert len(got) > length // 3


def test_llada_s_rounding_on_the_joint():
  means = np.array([v.mean() for v in by_count(X)])
  weight = distribution(4, 8, "half_even") / 4
  assert (weight * means).sum() == pytest.approx(5.835992, rel=1e-5)
  # Asked for, it is drawn, although all 15 sets of masks would be fewer.
  got = likelihood.bound(
    *(joint.scores(), jnp.asarray(X), jnp.ones(4, bool), 3),
    *(jax.random.key(0), 400, 8, "half_even"),
  )
  assert got.error > 0 and abs(got.mean - 5.835992) < 4 * got.error


def test_guidance():
  scores = joint.scores()
  rows = jnp.array([[0, 3, 2, 3], [1, 1, 3, 3]])
  prompt = jnp.array([True, False, True, False])
  assert likelihood.guided(scores, prompt, 3, 0.0) is scores
  got = likelihood.guided(scores, prompt, 3, 0.5)(rows)
  blind = jnp.where(prompt, 3, rows)
  want = scores(blind) + 1.5 * (scores(rows) - scores(blind))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_greedy():
  scores = joint.scores()
  best = joint.SEQUENCES[np.argmax(joint.table())]
  reached = [
    x
    for x in joint.SEQUENCES
    if likelihood.greedy(scores, jnp.asarray(x), ALL, joint.MASK)
  ]
  assert len(reached) == 1  # one path, one end
  target = jnp.array([False, False, False, True])
  assert likelihood.greedy(scores, jnp.asarray(best), target, joint.MASK)


def test_edges():
  scores, key = joint.scores(), jax.random.key(0)
  none = likelihood.bound(scores, X, ~ALL, joint.MASK, key)
  assert (none.mean, none.samples) == (0.0, 0)
  one = jnp.array([False, True, False, False])
  got = likelihood.bound(scores, X, one, joint.MASK, key)
  assert (got.error, got.samples) == (0.0, 1)
  assert likelihood.exact(scores, X, ~ALL, joint.MASK).samples == 0
  with pytest.raises(
    UserError, match="samples is 10, expected a multiple of 4"
  ):
    likelihood.bound(scores, X, ALL, joint.MASK, key, 10, 4)


@pytest.mark.parametrize("samples", [8, 16])
def test_logits_that_are_no_numbers(samples):
  """Where masks are drawn, and where all are tried."""

  def broken(tokens):
    return joint.scores()(tokens).at[:, 1].set(jnp.nan)

  with pytest.raises(UserError, match="likelihood: logits are not finite"):
    likelihood.bound(broken, X, ALL, joint.MASK, jax.random.key(0), samples, 8)
