"""Muon against numpy: singular values, the blog's formula, and who gets it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.optim import muon, optim
from research.training import state
from research.typing import UserError


@pytest.mark.parametrize("shape", [(16, 24), (16, 40), (3, 40, 16)])
def test_newton_schulz_makes_singular_values_one(shape):
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape)
  got = np.asarray(jax.jit(muon.newton_schulz)(jnp.float32(x)), np.float64)
  assert got.shape == shape
  values = np.linalg.svd(got, compute_uv=False)
  assert values.min() > 0.65 and values.max() < 1.25
  # The singular vectors are kept: x' u is symmetric, positive definite.
  product = np.swapaxes(x, -1, -2) @ got
  np.testing.assert_allclose(
    product,
    np.swapaxes(product, -1, -2),
    atol=5e-6 * np.abs(product).max() * shape[-1],
  )
  assert np.linalg.eigvalsh(product).min() > -1e-3


def test_singular_values_go_through_the_polynomial():
  rng = np.random.default_rng(1)
  u, _ = np.linalg.qr(rng.normal(size=(12, 12)))
  v, _ = np.linalg.qr(rng.normal(size=(12, 12)))
  s = np.linspace(0.05, 1, 12)
  got = muon.newton_schulz(jnp.float32(u * s @ v.T), steps=3)
  want = s / np.sqrt((s**2).sum())
  a, b, c = muon.COEFFICIENTS
  for _ in range(3):
    want = a * want + b * want**3 + c * want**5
  # Products of 12 numbers near 1 in float32, nine of them in a row.
  np.testing.assert_allclose(u.T @ got @ v, np.diag(want), atol=2e-5)


def params_and_gradients(steps):
  rng = np.random.default_rng(2)
  shapes = {
    "embed": (7, 4),
    "run0": {
      "layer0": {
        "mlp": {"up": (2, 4, 12), "down": (2, 12, 4)},
        "norm": {"scale": (2, 4)},
      }
    },
  }

  def draw(scale):
    return jax.tree.map(
      lambda shape: scale * rng.normal(size=shape),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )

  return draw(1.0), [draw(0.5) for _ in range(steps)]


def orthogonal(x):
  a, b, c = muon.COEFFICIENTS
  x = x / np.linalg.norm(x)
  for _ in range(5):
    x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
  return x


def test_matrices_move_as_the_blog_says_and_all_else_by_adam():
  start, gradients = params_and_gradients(4)
  rates = [0.05, 0.1, 0.1, 0.05]
  tx = muon.muon(optim.linear(0.1, 4, warmup=2), adam=0.3, clip=None)
  moved = jax.tree.map(jnp.float32, start)
  held, update = tx.init(moved), jax.jit(tx.update)
  for g in gradients:
    updates, held = update(jax.tree.map(jnp.float32, g), held, moved)
    moved = optax.apply_updates(moved, updates)

  where = ("run0", "layer0", "mlp")

  def at(tree_, name):
    for key in where:
      tree_ = tree_[key]
    return tree_[name]

  for name, gain in (("up", 3**0.5), ("down", 1.0)):
    want = at(start, name)
    for layer in range(2):
      m = 0.0
      for g, rate in zip(gradients, rates, strict=True):
        g = at(g, name)[layer]
        m = 0.95 * m + 0.05 * g
        want[layer] -= rate * gain * orthogonal(0.95 * m + 0.05 * g)
    np.testing.assert_allclose(at(moved, name), want, atol=2e-5)

  adam = optax.adam(lambda i: 0.3 * jnp.asarray(rates)[i], 0.9, 0.95)
  other = {"embed": start["embed"]}
  follow = adam.init(other)
  for g in gradients:
    updates, follow = adam.update({"embed": g["embed"]}, follow)
    other = optax.apply_updates(other, updates)
  np.testing.assert_allclose(moved["embed"], other["embed"], atol=2e-6)


@pytest.mark.parametrize(
  "path", ["language/run0/layer0/mlp/up", "run0/layer0/mlp/up/trained/a"]
)
def test_a_run_without_matrices_is_refused(path):
  """Of a tower or of adapters, all of which Adam would move."""
  params = jnp.ones((2, 4, 8))
  for name in reversed(path.split("/")):
    params = {name: params}
  with pytest.raises(UserError, match=f"paths such as '{path}'"):
    muon.muon(0.02).init(params)
  muon.muon(0.02, matrices="(up|a)$").init(params)


def test_optax_s_muon_moves_alike_first_and_then_weighs_momentum_less():
  """Why ours is by hand: the published m, and what checkpoints hold."""
  _, gradients = params_and_gradients(40)
  gradients = [jnp.float32(g["run0"]["layer0"]["mlp"]["up"]) for g in gradients]
  where = optax.contrib.MuonDimensionNumbers(-2, -1)
  theirs = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=where),
    optax.scale((12 / 4) ** 0.5),
  )
  both = {"ours": muon.scale_by_muon(), "theirs": theirs}
  held = {name: tx.init(gradients[0]) for name, tx in both.items()}
  update = {name: jax.jit(tx.update) for name, tx in both.items()}
  apart = []
  for g in gradients:
    found = {}
    for name in both:
      found[name], held[name] = update[name](g, held[name])
    apart.append(float(jnp.abs(found["ours"] - found["theirs"]).max()))
  assert apart[0] < 1e-4 and max(apart[1:4]) > 0.05
  assert apart[-1] < 0.1 * max(apart[1:4])
  fields = {muon.MuonState: ("momentum",)}
  fields[optax.contrib.MuonState] = "count", "mu", "ns_coeffs"
  for kind, names in fields.items():
    assert kind._fields == names


def test_the_rate_is_told_and_state_lies_like_parameters():
  start, _ = params_and_gradients(0)
  made = state.create(jax.tree.map(jnp.float32, start), ".", muon.muon(0.02))
  found = {
    path: x.shape
    for path, x in muon.tree.flatten_paths(made.opt_state)
    if x.ndim
  }
  # Each ends like its parameter's path, which is what sharding goes by.
  ends = ("embed", "mlp/up", "mlp/down", "norm/scale")
  assert all(path.endswith(ends) for path in found)
  assert sum(path.endswith("mlp/up") for path in found) == 1
  assert sum(path.endswith("embed") for path in found) == 2
