"""Time-conditioned models against the formulas in numpy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research import sharding, tree
from research.nn.time_embedding import TimeEmbedding
from research.nn.transformer import init_cache
from research.typing import UserError
from tests import support, support_numpy

SMALL = TimeEmbedding(features=8, hidden=12, width=6)
B, T, V = 3, 5, 17


@functools.cache
def network(clock=SMALL, depth=2, **changes):
  model = support.model(
    depth=depth,
    width=16,
    hidden=16,
    head_dim=8,
    heads=2,
    vocab=V,
    time_embedding=clock,
    **changes,
  )
  return model, support.params(model)


def ask(model, params, tokens, **kwargs):
  return model.apply({"params": params}, tokens, mask=Mask.full(), **kwargs)[0]


@pytest.mark.parametrize("source", ["time", "sigma"])
def test_sinusoids_are_those_of_the_formula(source):
  clock = TimeEmbedding(input=source, scale=3.0, features=6)
  t = np.array([0.0, 0.25, 1.0])
  x = 3 * (t if source == "time" else -np.log(1 - (1 - 1e-3) * t))
  angle = x[:, None] * 10_000 ** (-np.arange(3) / 3)
  want = np.concatenate([np.cos(angle), np.sin(angle)], -1)
  got = clock.sinusoids(jnp.asarray(t, jnp.float32))
  # An ulp of 1 - 1e-3 is 6e-5 of what is left of 1 at time 1.
  np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.slow
def test_a_layer_is_the_one_of_the_formula():
  model, params = network(depth=1)
  x = np.random.default_rng(0).standard_normal((B, T, 16))
  time = np.array([0.1, 0.5, 0.9])
  got = ask(model, params, jnp.asarray(x, jnp.float32), time=jnp.asarray(time))
  place = np.broadcast_to(np.arange(T), (B, T))
  seen = np.ones((B, T, T), bool)
  want = support_numpy.states(model, params, x, place, seen, time)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
  "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_it_starts_as_the_model_without_conditioning(dtype):
  conditioned = network()[0].clone(dtype=dtype)
  plain = network(None)[0].clone(dtype=dtype)
  tokens = support.tokens(B, T, V)
  init = functools.partial(jax.jit, static_argnums=0)(
    lambda m, key: m.init(key, tokens)["params"]
  )
  params = init(conditioned, jax.random.key(3))
  # The weights that both have are the same, too.
  shared = init(plain, jax.random.key(3))
  pairs = dict(tree.flatten_paths(params))
  for path, x in tree.flatten_paths(shared):
    np.testing.assert_array_equal(x, pairs[path])
  time = jnp.array([0.0, 0.3, 1.0])
  got = jax.jit(lambda p: ask(conditioned, p, tokens, time=time))(params)
  want = jax.jit(lambda p: ask(plain, p, tokens))(shared)
  np.testing.assert_array_equal(
    np.asarray(got, np.float32), np.asarray(want, np.float32)
  )


@pytest.mark.slow
def test_closed_layers_start_as_nothing():
  model, _ = network(dataclasses.replace(SMALL, zero_gate=True))
  tokens = support.tokens(B, T, V)
  params = model.init(jax.random.key(0), tokens)["params"]
  got = ask(model, params, tokens, time=jnp.ones(B))
  x = params["embed"][tokens]
  want = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def test_times_of_rows_are_times_of_their_tokens_and_rows_are_apart():
  model, params = network()
  tokens = support.tokens(B, T, V)
  time = jnp.array([0.2, 0.7, 0.4])
  f = jax.jit(lambda tokens, t: ask(model, params, tokens, time=t))
  rows = f(tokens, time)
  each = f(tokens, jnp.broadcast_to(time[:, None], (B, T)))
  chex.assert_trees_all_close(each, rows, rtol=1e-5, atol=1e-5)
  alone = f(tokens[1:2], time[1:2])
  chex.assert_trees_all_close(alone, rows[1:2], rtol=1e-5, atol=1e-5)
  other = f(tokens, time.at[1].set(0.1))
  chex.assert_trees_all_equal(other[0], rows[0])
  assert float(jnp.abs(other[1] - rows[1]).max()) > 1e-2


@pytest.mark.slow
def test_the_time_is_learned_from():
  model, _ = network()
  tokens = support.tokens(B, T, V)
  params = model.init(jax.random.key(0), tokens)["params"]

  def loss(params):
    return (ask(model, params, tokens, time=jnp.ones(B)) ** 3).sum()

  grads = dict(tree.flatten_paths(jax.jit(jax.grad(loss))(params)))
  for path, x in grads.items():
    if "_modulation" in path:
      assert float(jnp.abs(x).max()) > 1e-3, path
    elif path.startswith("clock"):  # behind maps that are zero
      assert not x.any(), path
  params = network()[1]
  grads = dict(tree.flatten_paths(jax.jit(jax.grad(loss))(params)))
  assert all(jnp.abs(x).max() > 0 for p, x in grads.items() if "clock" in p)


def test_with_a_cache_it_is_what_it_is_without():
  model, params = network()
  tokens = support.tokens(B, T, V)
  time = jnp.array([0.2, 0.7, 0.4])

  @jax.jit
  def both():
    whole, _ = model.apply({"params": params}, tokens, time=time)
    cache = init_cache(model, params, B, T)
    first, cache = model.apply(
      {"params": params}, tokens[:, :3], cache=cache, time=time
    )
    rest, _ = model.apply(
      {"params": params}, tokens[:, 3:], cache=cache, time=time
    )
    return whole, jnp.concatenate([first, rest], axis=1)

  want, got = both()
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_else_is_a_model_s_time():
  model, params = network()
  with pytest.raises(UserError, match="conditioned on the time"):
    ask(model, params, support.tokens(B, T, V))
  plain, weights = network(None)
  tokens = support.tokens(B, T, V)
  with pytest.raises(UserError, match="no time_embedding"):
    ask(plain, weights, tokens, time=jnp.ones(B))
  sizes = dict(features=3), dict(hidden=0), dict(scale=0.0)
  for wrong in (*sizes, dict(input="noise")):
    with pytest.raises(UserError, match="TimeEmbedding"):
      TimeEmbedding(**wrong)


@pytest.mark.slow
def test_every_weight_has_a_place_on_a_mesh():
  shapes = support.shapes(network()[0])
  for path, _ in tree.flatten_paths(shapes):
    assert sharding.logical_axes(path) is not None, path
