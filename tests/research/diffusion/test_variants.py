"""Any-order and score objectives, by enumeration and by their papers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion.schedule import Linear
from research.diffusion.variants import AnyOrder, ScoreEntropy
from research.typing import UserError
from tests.research.diffusion.test_objective import (
  MASK,
  T,
  V,
  exact,
  losses_of_sets,
  network,
  rows,
)


def test_any_order_draws_each_number_and_each_set_alike():
  objective = AnyOrder(mask_id=MASK)
  n = 30_000
  maskable = jnp.ones((n, 3), bool)
  masked, counts = objective.draw(jax.random.key(0), maskable, maskable * 0)
  number = np.asarray(masked).sum(-1)
  np.testing.assert_array_equal(counts[:, 0], (3 / number).astype(np.float32))
  for k in (1, 2, 3):
    sets = [np.isin(range(3), s) for s in itertools.combinations(range(3), k)]
    for chosen in sets:
      found = (np.asarray(masked) == chosen).all(-1).mean()
      p = 1 / 3 / len(sets)
      assert abs(found - p) < 5 * np.sqrt(p / n)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["independent", "even"])
@pytest.mark.sample(2)
def test_any_order_is_the_bound(spread):
  """Draws without the network, whose losses of all sets are known."""
  model, params = network()
  objective = AnyOrder(model=model, mask_id=MASK, spread=spread)
  row, known = losses_of_sets()

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, n):
    maskable = jnp.ones((n, T), bool)
    masked, counts = objective.draw(key, maskable, maskable * 0)
    return (masked << jnp.arange(T)).sum(-1), counts[:, 0]

  def values(key, n):
    named, counts = map(np.asarray, draw(key, n))
    return known[named] * counts

  # The same as the objective's own, with its network.
  n, key = 16, jax.random.key(0)
  batch = rows(n) | {"tokens": jnp.broadcast_to(row, (n, T))}
  loss, weight, _ = jax.jit(objective)(params, batch, key)
  assert float(weight) == n * T
  np.testing.assert_allclose(loss, values(key, n).sum(), rtol=2e-5)
  found = values(jax.random.key(1), 2**18)
  error = found.std() / found.size**0.5
  assert error < 0.02 and abs(found.mean() - exact()) < 4.5 * error


def test_prompts_and_padding_are_not_counted():
  objective = AnyOrder(mask_id=MASK, noise="learned")
  batch = rows(64)
  batch["weights"] = batch["weights"].at[:, :2].set(0)
  maskable = objective.maskable(batch)
  masked, counts = objective.draw(
    jax.random.key(0), maskable, batch["segments"]
  )
  assert not (masked & ~maskable).any() and masked.any(-1).all()
  np.testing.assert_allclose(np.where(masked, counts, 0).sum(-1), 3, rtol=1e-6)
  none = objective.draw(jax.random.key(0), maskable & False, batch["segments"])
  assert not none[0].any() and np.isfinite(none[1]).all()


@pytest.mark.slow
def test_score_entropy_is_that_of_the_paper():
  """Value and gradient: SEDD's sum over sigma, for the same masks."""
  model, params = network()
  objective = ScoreEntropy(model=model, mask_id=MASK, schedule=Linear(), rows=4)
  batch, key = rows(5), jax.random.key(0)
  masked, counts = objective.draw(
    key, objective.maskable(batch), batch["segments"]
  )
  t = 1 / counts
  sigma, slope = -jnp.log1p(-t), 1 / (1 - t)
  ratio = 1 / jnp.expm1(sigma)

  def truth(params):
    tokens = batch["tokens"]
    noisy = jnp.where(masked, MASK, tokens)
    hidden, _ = model.apply({"params": params}, noisy, None, Mask.full())
    out = model.apply({"params": params}, hidden, method="logits")
    out = out.at[..., MASK].set(-1e9)
    score = jnp.exp(out) * ratio[..., None] / (V - 1)
    own = jnp.take_along_axis(score, tokens[..., None], -1)[..., 0]
    each = score.sum(-1) - ratio * jnp.log(own) + ratio * (jnp.log(ratio) - 1)
    return jnp.where(masked, slope * each, 0).sum()

  def ours(params):
    return objective(params, batch, key)[0]

  got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, truth))
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(complement=True), "complement is True, expected False"),
    (dict(levels=4), "levels is 4, expected None"),
    (dict(count="uniform"), "count is 'uniform', expected 'elbo'"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UserError, match=message):
    AnyOrder(mask_id=MASK, **change)
