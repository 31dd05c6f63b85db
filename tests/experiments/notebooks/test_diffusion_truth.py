"""The perfect denoiser of a chain, against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.notebooks import diffusion_truth as truth
from research.data.sources.synthetic import Markov
from research.diffusion import likelihood

V, T = 3, 4
SOURCE = Markov(vocab=V, length=T, concentration=0.5, seed=3)
ROWS = np.array(list(itertools.product(range(V), repeat=T)))


def test_rows_have_the_probability_of_the_chain():
  p = np.exp(-truth.surprise(SOURCE, ROWS))
  assert p.sum() == pytest.approx(1, abs=1e-9)
  # The mean of -log p, by all 81 rows.
  entropy = -(p * np.log(p)).sum() / T
  assert truth.entropy(SOURCE, T) == pytest.approx(entropy, rel=1e-6)


def test_every_conditional_is_that_of_the_joint():
  p = np.exp(-truth.surprise(SOURCE, ROWS))
  noisy = np.array(list(itertools.product(range(V + 1), repeat=T)))
  chain = truth.Chain(mask_id=V)
  params = truth.tables(SOURCE, T)
  found = jax.nn.softmax(jax.jit(chain.scores)(params, jnp.asarray(noisy)))
  for row, got in zip(noisy, np.asarray(found), strict=True):
    seen = row != V
    for i in np.flatnonzero(~seen):
      fits = (ROWS[:, seen] == row[seen]).all(-1)
      want = [p[fits & (ROWS[:, i] == v)].sum() / p[fits].sum() for v in (0, 1)]
      np.testing.assert_allclose(got[i, :2], want, atol=1e-5)
      assert got[i, V] == 0


@pytest.mark.slow
def test_its_bound_is_no_bound_but_the_truth():
  chain = truth.Chain(mask_id=V)
  params = truth.tables(SOURCE, T)
  row = ROWS[47]
  by_count = []
  for n in range(1, T + 1):
    sets = [
      np.isin(np.arange(T), s) for s in itertools.combinations(range(T), n)
    ]
    found = likelihood.values(
      lambda x: chain.scores(params, x),
      jnp.asarray(row),
      jnp.ones(T, bool),
      jnp.asarray(np.array(sets)),
      V,
    )
    by_count.append(float(found.mean()))
  want = truth.surprise(SOURCE, row[None])[0]
  assert np.mean(by_count) == pytest.approx(want, rel=1e-5)


def test_what_is_off():
  many = Markov(vocab=V, length=64, concentration=0.5, seed=3, count=512)
  rows = np.stack([e.tokens for e in many.examples(None)])
  assert truth.off(SOURCE, rows) < 0.02
  # One pair again and again: all that others should have had is missing.
  share = SOURCE.stationary[0] * SOURCE.transitions[0, 0]
  same = np.zeros((512, T), int)
  assert truth.off(SOURCE, same) == pytest.approx(1 - share)
