"""Tests that a learned rotation stays orthogonal and beats a random one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.support as support
from research import tree
from research.quant.activations import Round
from research.quant.algorithms import rotate, spinquant
from research.quant.algorithms.calibrate import Calibration
from research.quant.numerics import hadamard
from research.typing import UserError


def test_steps_stay_orthogonal_and_descend():
  """Towards another rotation; the loss is the distance to it."""
  rng = np.random.default_rng(0)
  target, r = (np.linalg.qr(rng.standard_normal((24, 24)))[0] for _ in "ab")
  if np.linalg.det(target) * np.linalg.det(r) < 0:
    r[0] *= -1  # no path leads to a reflection
  target, r = jnp.asarray(target, jnp.float32), jnp.asarray(r, jnp.float32)

  def far(r):
    return jnp.sum((r - target) ** 2)

  @jax.jit
  def step(r):
    return spinquant.cayley_step(r, jax.grad(far)(r), 0.3)

  losses = [float(far(r))]
  for _ in range(80):
    r = step(r)
    losses.append(float(far(r)))
  np.testing.assert_allclose(r @ r.T, np.eye(24), atol=2e-5)
  assert np.all(np.diff(losses) < 1e-4)
  assert losses[-1] < 0.1 * losses[0]


def test_a_small_step_is_along_the_projected_gradient():
  rng = np.random.default_rng(0)
  r = np.linalg.qr(rng.standard_normal((6, 6)))[0]
  g = rng.standard_normal((6, 6))
  rate = 1e-3
  got = spinquant.cayley_step(
    jnp.asarray(r, jnp.float32), jnp.asarray(g, jnp.float32), rate
  )
  a = (g @ r.T - r @ g.T) / 2
  want = np.linalg.solve(
    np.eye(6) + rate / 2 * a, (np.eye(6) - rate / 2 * a) @ r
  )
  np.testing.assert_allclose(got, want, atol=1e-6)


@functools.cache
def _case():
  """Returns a model with large channels, and text that it generated."""
  model = support.model("llama", tied=True, depth=2)
  sizes = np.random.default_rng(0).lognormal(0, 1.0, 32).astype(np.float32)

  def spread(path, w):
    return w * sizes if path.endswith("_norm/scale") else w

  params = tree.map_paths(spread, support.params(model))
  run = jax.jit(functools.partial(_logits, model, params))
  tokens = np.array(support.tokens(8, 16))
  for t in range(15):
    found = run(jnp.asarray(tokens))
    tokens[:, t + 1] = np.asarray(found)[:, t].argmax(-1)
  return model, params, tokens, run


def _logits(model, params, tokens):
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


@pytest.mark.slow
def test_learned_rounds_better_than_random():
  model, params, tokens, run = _case()
  made = spinquant.SpinQuant(
    calibration=Calibration(batch=8),  # all rows, each step
    op=Round(bits=3),
    steps=30,
    model=model,
    hidden=False,
  )
  r = hadamard.random_matrix(jax.random.key(0), 32)
  learned, losses = made.learn_rotation(params, r, tokens)
  np.testing.assert_allclose(learned @ learned.T, np.eye(32), atol=2e-5)
  # Losses of batches differ by 0.15; each of the last is below its first one.
  assert (np.array(losses[-5:]) < np.array(losses[:5])).all()
  turned = rotate.rotate_model(model, params, learned, None, False)
  want = run(jnp.asarray(tokens))
  got = jax.jit(functools.partial(_logits, model))(turned, jnp.asarray(tokens))
  assert jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 1e-4


def test_bad_settings_raise():
  with pytest.raises(UserError, match="no model"):
    spinquant.SpinQuant()({}, jax.random.key(0))
