"""Policy gradients of a tiny Transformer, against sums over all its answers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from research.data.batches import batch_of
from research.training.alignment.policy_gradient import (
  PolicyGradient,
)
from research.training.alignment.surrogate import PerLength, Surrogate
from tests import support

V, PROMPT, LENGTH = 4, 2, 2
MODEL = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
ANSWERS = np.array(list(itertools.product(range(V), repeat=LENGTH)))


def every_answer():
  """Returns all answers to one prompt as a batch, and their rewards."""
  prompt = np.broadcast_to([1, 3], (len(ANSWERS), PROMPT))
  rows = np.concatenate([prompt, ANSWERS], axis=1)
  batch = batch_of(rows, np.arange(PROMPT + LENGTH) >= PROMPT)
  return batch, jnp.asarray(ANSWERS.sum(1) % 3, jnp.float32)


@pytest.mark.slow
def test_log_probs_are_the_tempered_policy_s():
  params, (batch, _) = support.params(MODEL), every_answer()
  how = PolicyGradient(model=MODEL, temperature=0.7)
  found = np.asarray(jax.jit(how.log_probs)(params, batch))
  hidden, _ = MODEL.apply({"params": params}, batch["tokens"])
  logits = MODEL.apply({"params": params}, hidden, method="logits")
  logp = special.log_softmax(np.float64(logits) / 0.7, axis=-1)
  want = np.take_along_axis(logp, np.asarray(batch["targets"])[..., None], -1)
  want = np.where(np.arange(4) % 3 == 0, 0, want[..., 0])  # 1 and 2 predict
  np.testing.assert_allclose(found, want, atol=1e-5)
  # Of all answers to one prompt, the probabilities are one's.
  assert np.exp(found.sum(-1)).sum() == pytest.approx(1, abs=1e-5)


def test_the_gradient_is_that_of_the_expected_reward():
  """Answers weighted by their probability: the sum that sampling estimates."""
  params, (batch, rewards) = support.params(MODEL), every_answer()
  how = PolicyGradient(
    model=MODEL, surrogate=Surrogate(normalization=PerLength(1))
  )
  log_probs = jax.jit(how.log_probs)
  old = log_probs(params, batch)
  chance = jnp.exp(old.sum(-1))
  # A baseline changes nothing: probabilities sum to 1.
  given = batch | {"old": old, "advantage": chance * (rewards - 0.6)}

  def expected(params):
    return -(jnp.exp(how.log_probs(params, batch).sum(-1)) * rewards).sum()

  def loss(params):
    total, *rest = how(params, given, None)
    return total, rest

  @jax.jit
  def both(params):
    return jax.grad(loss, has_aux=True)(params), jax.grad(expected)(params)

  (got, (weight, sums)), want = both(params)
  chex.assert_trees_all_close(got, want, atol=2e-6)
  assert max(float(abs(g).max()) for g in jax.tree.leaves(want)) > 1e-2
  assert float(weight) == len(ANSWERS)
  surprisal = -(np.asarray(old).sum(-1) / LENGTH).mean()
  assert float(sums["surprisal"] / weight) == pytest.approx(surprisal, rel=1e-5)
  np.testing.assert_allclose(sums["ratio"] / weight, 1, rtol=1e-6)
