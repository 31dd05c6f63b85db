"""Learned schedules: the bound, by quadrature over times and all masks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion.learned import NAME, GenMD4, Rates
from research.typing import UserError
from tests import support

V, T = 4, 3
MASK = V - 1
MASKS = np.array(list(itertools.product([False, True], repeat=T)))[1:]
W = np.array([0.5, 1.0, 2.0, 1.0])
ROW = np.array([0, 2, 1])


def bound(row, w, chances, first, xp=jnp, nodes=48):
  """Returns the bound of a row, all masks and times weighed by what they are.

  Args:
    row: tokens.
    w: of every id.
    chances: (times, masks) -> p of each place's token, `[N, M, T, V - 1]`.
    first: where the model's part ends.
    xp: numpy or jax.numpy.
    nodes: of the quadrature, in log t.
  """
  x, weight = np.polynomial.legendre.leggauss(nodes)
  span = -np.log(first)
  t = np.exp(-span * (1 - x) / 2)
  weight = weight * span / 2 * t
  own = w[row]
  rate = xp.exp(own * np.log(t)[:, None])[:, None]
  q = xp.where(MASKS, rate, 1 - rate).prod(-1)
  p = chances(t, MASKS)
  hit = xp.take_along_axis(p, np.broadcast_to(row, p.shape[:-1])[..., None], -1)
  each = own * (-xp.log(hit[..., 0]) - 1) + (p * w[:MASK]).sum(-1)
  inside = (q[..., None] * xp.where(MASKS, each, 0)).sum((1, 2)) / t
  prior = xp.exp(w[:MASK] * np.log(first))
  rest = xp.exp(own * np.log(first))
  rest = -rest * xp.log(prior[row] / prior.sum())
  return (weight * inside).sum() + rest.sum()


def test_the_reference_is_tight_for_a_perfect_model():
  """-log p, where what is masked says what it may be: p(x) times t^w."""
  rng = np.random.default_rng(0)
  joint = rng.dirichlet(np.ones(MASK**T)).reshape((MASK,) * T)
  sequences = np.array(list(itertools.product(range(MASK), repeat=T)))

  def chances(t, masks):
    out = np.zeros((len(t), len(masks), T, MASK))
    for m, mask in enumerate(masks):
      fits = sequences[(sequences[:, ~mask] == ROW[~mask]).all(-1)]
      p = joint[tuple(fits.T)] * t[:, None] ** W[fits[:, mask]].sum(-1)
      p = p / p.sum(-1, keepdims=True)
      for i, v in itertools.product(range(T), range(MASK)):
        out[:, m, i, v] = p[:, fits[:, i] == v].sum(-1)
    return out

  got = bound(ROW, W, chances, 1e-7, np, 200)
  # Below `first` the prior is not the joint: t^0.5 of some nats.
  assert got == pytest.approx(-np.log(joint[tuple(ROW)]), abs=5e-3)


@functools.cache
def network():
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
  return model, support.params(model)


@pytest.mark.slow
def test_value_and_gradient_are_those_of_the_bound():
  """Of w too, which decides what is masked."""
  model, params = network()
  first, n, repeats = 0.05, 512, 24
  raw = jnp.asarray(np.log(np.expm1(W)), jnp.float32)

  def truth(raw, scale):
    tokens = jnp.where(MASKS, MASK, ROW)
    tree = jax.tree.map(lambda x: x * scale, params)
    hidden, _ = model.apply({"params": tree}, tokens, None, Mask.full())
    logits = model.apply({"params": tree}, hidden, method="logits")
    p = jax.nn.softmax(logits[..., :MASK])
    w = jax.nn.softplus(raw)
    return bound(ROW, w, lambda t, _: p[None], first)

  objective = GenMD4(
    model=model, mask_id=MASK, first=first, spread="independent", rows=4096
  )
  batch = {
    "tokens": jnp.broadcast_to(jnp.asarray(ROW, jnp.int32), (n, T)),
    "weights": jnp.ones((n, T)),
    "positions": jnp.broadcast_to(jnp.arange(T), (n, T)),
    "segments": jnp.zeros((n, T), jnp.int32),
  }

  def ours(raw, scale, key):
    tree = jax.tree.map(lambda x: x * scale, params) | {NAME: raw}
    loss, weight, _ = objective(tree, batch, key)
    return loss / weight * T

  one = jnp.float32(1.0)
  want = jax.jit(jax.value_and_grad(truth, (0, 1)))(raw, one)
  keys = jax.random.split(jax.random.key(0), repeats)
  f = jax.value_and_grad(ours, (0, 1))
  found = jax.jit(lambda keys: jax.lax.map(lambda k: f(raw, one, k), keys))(
    keys
  )
  for got, right in zip(
    jax.tree.leaves(found), jax.tree.leaves(want), strict=True
  ):
    error = np.asarray(got).std(0, ddof=1) / np.sqrt(repeats)
    distance = np.abs(np.asarray(got).mean(0) - np.asarray(right))
    assert (distance < 4.5 * error + 1e-5).all(), (distance, error)
    # Errors small enough for a missing term to be seen.
    assert (error < 0.15 * np.abs(np.asarray(right)).max()).all()


def test_rates_begin_where_they_are_told():
  params = Rates(vocab=5, start=0.7)({"embed": 1}, jax.random.key(0))
  np.testing.assert_allclose(jax.nn.softplus(params[NAME]), 0.7, rtol=1e-6)
  assert params["embed"] == 1 and params[NAME].shape == (5,)


def test_mistakes():
  with pytest.raises(UserError, match=r"no 'mask_rates'; put learned\.Rates"):
    GenMD4(mask_id=3)({}, {}, None)
