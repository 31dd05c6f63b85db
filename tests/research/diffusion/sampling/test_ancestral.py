"""Ancestral samplers against a joint distribution that can be enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import ancestral
from research.diffusion.sampling.ancestral import Ancestral
from research.diffusion.sampling.remask import Remask
from research.diffusion.schedule import Cosine, Linear
from research.generation.sampling import row_keys
from research.typing import UserError
from tests.research.diffusion import joint

N = 8_000
# Of 81 frequencies: half the sum of their mean deviations.
NOISE = 0.5 * np.sqrt(2 / np.pi / N) * np.sqrt(joint.table()).sum()


@functools.partial(jax.jit, static_argnames=("f", "how", "rows"))
def run(f, how, key, rows):
  tokens = jnp.full(rows, joint.MASK, jnp.int32)
  keys = row_keys(key, jnp.arange(rows[0]))
  more = () if how is None else (how,)
  masked = jnp.ones(rows, bool)
  return f(joint.scores(), tokens, masked, joint.MASK, keys, *more)


def law(f, how=None):
  tokens, calls = run(f, how, jax.random.key(2), (N, 4))
  names = (np.asarray(tokens) * 3 ** np.arange(4)[::-1]).sum(-1)
  return np.bincount(names, minlength=81) / N, int(calls)


def variation(p, q=None):
  return 0.5 * np.abs(p - (joint.table() if q is None else q)).sum()


def test_first_hitting_is_exact():
  found, calls = law(ancestral.first_hitting)
  assert calls == 4
  assert variation(found) < 1.5 * NOISE


def marginals():
  tables = np.exp(joint.conditionals()[-1])  # all places masked
  return np.prod([tables[i][joint.SEQUENCES[:, i]] for i in range(4)], axis=0)


def test_one_step_is_the_product_of_marginals():
  found, _ = law(ancestral.sample, Ancestral(steps=1))
  assert variation(found, marginals()) < 1.5 * NOISE
  assert variation(marginals()) == pytest.approx(0.3844, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "how",
  [
    dict(),
    dict(grid="cosine"),
    dict(schedule=Cosine()),
    dict(remask=Remask(kind="rescale", eta=0.2)),
    dict(remask=Remask(eta=0.05, start=0.8, stop=0.2)),
  ],
  ids=str,
)
@pytest.mark.sample(6)
def test_many_steps_approach_the_joint(how):
  few, _ = law(ancestral.sample, Ancestral(steps=2, **how))
  many, calls = law(ancestral.sample, Ancestral(steps=64, **how))
  assert calls == 64
  # Two of four places fall into one of 64 steps 6 / 64 of the time.
  assert variation(many) < 1.5 * NOISE + 0.1 * 0.39
  assert variation(few) > variation(many) + 0.05


@pytest.mark.parametrize(
  ("t", "s", "sigma", "fill", "masked"),
  [
    (0.6, 0.5, 0.0, 0.1667, 0.8333),
    (0.6, 0.5, 0.02, 0.18, 0.82),
    (0.6, 0.5, 1.0, 0.8333, 0.1667),
    (0.5, 0.4, 0.8, 1.0, 0.0),
  ],
)
def test_chances_of_the_paper(t, s, sigma, fill, masked):
  got = Linear().transition_probabilities(
    jnp.float32(t), jnp.float32(s), jnp.float32(sigma)
  )
  np.testing.assert_allclose(got, (fill, masked), atol=1e-4)
  most = Linear().largest_sigma(jnp.float32(t), jnp.float32(s))
  assert float(most) == pytest.approx(min(1, s / (1 - t)), rel=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_marginals_are_the_process_s(sigma):
  """A place is masked at s with probability 1 - alpha(s), whatever it was."""
  t, s = jnp.float32(0.7), jnp.float32(0.55)
  most = Linear().largest_sigma(t, s)
  sigma = sigma * most
  _, masked = Linear().transition_probabilities(t, s, sigma)
  got = 0.7 * masked + 0.3 * sigma
  assert float(got) == pytest.approx(0.55, rel=1e-5)


@pytest.mark.slow
def test_nothing_masked_again_is_the_plain_sampler():
  key, rows = jax.random.key(4), (64, 4)
  plain, _ = run(ancestral.sample, Ancestral(steps=8), key, rows)
  for kind in ("cap", "rescale", "confidence"):
    how = Ancestral(steps=8, remask=Remask(kind=kind, eta=0.0))
    got, _ = run(ancestral.sample, how, key, rows)
    np.testing.assert_array_equal(got, plain)
  how = Ancestral(steps=8, remask=Remask(kind="confidence", eta=0.5))
  got, _ = run(ancestral.sample, how, key, rows)
  assert (got != plain).any() and (got != joint.MASK).all()


def test_the_less_sure_are_masked_again_more():
  """`confidence`: as many as `rescale` on average, by softmax of doubt."""
  t, s = jnp.float32(0.6), jnp.float32(0.5)
  sure = jnp.array([[0.9, 0.1, 0.5, 1.0]])
  filled = jnp.array([[True, True, True, False]])
  how = Remask(kind="confidence", eta=0.3)
  got = np.asarray(how.sigma(Linear(), t, s, sure, filled))[0]
  weight = np.exp(-np.array([0.9, 0.1, 0.5]))
  # sigma_max is 1 here: (1 - alpha_s) / alpha_t = 0.5 / 0.4.
  np.testing.assert_allclose(got[:3], 0.9 * weight / weight.sum(), rtol=1e-5)
  assert got[3] == 0
  even = Remask(kind="rescale", eta=0.3).sigma(Linear(), t, s, sure, filled)
  assert got[:3].sum() == pytest.approx(float(even[0, :3].sum()), rel=1e-5)


@pytest.mark.parametrize("f", [ancestral.sample, ancestral.first_hitting])
def test_logits_that_are_no_numbers(f):
  def broken(tokens):
    return joint.scores()(tokens).at[:, 1].set(jnp.nan)

  rows = jnp.full((2, 4), joint.MASK, jnp.int32)
  given = broken, rows, rows == joint.MASK, joint.MASK
  keys = row_keys(jax.random.key(0), jnp.arange(2))
  how = (Ancestral(steps=3),) if f is ancestral.sample else ()
  with pytest.raises(UserError, match="ancestral: logits are not finite"):
    f(*given, keys, *how)
  # Compiled code cannot say so; it leaves no token that looks like one.
  found = jax.jit(lambda: f(*given, keys, *how)[0])()
  np.testing.assert_array_equal(found == ancestral.NOTHING, [[0, 1, 0, 0]] * 2)


def test_mistakes():
  for times in (dict(start=0.2, stop=0.8), dict(start=2.0), dict(stop=-0.1)):
    with pytest.raises(UserError, match="expected 0 <= stop <= start <= 1"):
      Remask(eta=0.1, **times)


def test_grids_of_times():
  """From 1 down to 0; Dream's are even to 0.001, and then all is filled."""
  for grid in ("uniform", "cosine", "dream"):
    times = np.asarray(ancestral.Ancestral(steps=5, grid=grid).times())
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
  inner = np.linspace(1, 1e-3, 6)[1:-1]
  np.testing.assert_allclose(times[1:-1], inner, rtol=1e-6)


def test_places_are_masked_again_between_two_times_only():
  how = Remask(eta=0.05, start=0.8, stop=0.2)
  sizes = [
    float(how.size(Linear(), jnp.array(t), jnp.array(t - 0.1)))
    for t in (0.9, 0.8, 0.5, 0.2, 0.1)
  ]
  np.testing.assert_allclose(sizes, [0, 0.05, 0.05, 0, 0], rtol=1e-5)
