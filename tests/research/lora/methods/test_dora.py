"""Tests DoRA's norm: of zeros, near cancellation, and of a changing base."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import weights
from research.lora import adapt
from research.lora.adapted import AdaptedTensor
from research.lora.methods.dora import DoRA
from tests.support_lora import lora

EPS = float(jnp.finfo(jnp.float32).eps)
IN, OUT, RANK = 12, 10, 3


def drawn(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def fresh(w, method):
  """Returns a new adapter around one matrix."""
  w = jax.tree.map(lambda x: x[None], w)
  arrays = adapt.init_adapters(jax.random.key(0), ["layers/0/x"], method, w, {})
  return jax.tree.map(lambda x: x[0], AdaptedTensor(w, *arrays, method=method))


def test_an_output_of_zeros_learns():
  """Such as a pruned column: its norm is 0, and 0 / 0 is NaN."""
  method, x = DoRA(rank=RANK), drawn(40, IN)
  t = fresh(drawn(IN, OUT, seed=1).at[:, 2].set(0), method)
  want, tx = x @ drawn(IN, OUT, seed=2), optax.adam(0.05)

  def loss(trained):
    w = dataclasses.replace(t, trained=trained)
    return jnp.square(weights.einsum("td,df->tf", x, w) - want).mean(0)

  @jax.jit
  def step(trained, state):
    slopes = jax.grad(lambda p: loss(p).sum())(trained)
    moves, state = tx.update(slopes, state)
    return optax.apply_updates(trained, moves), state, loss(trained)

  trained, state = t.trained, tx.init(t.trained)
  losses = []
  for _ in range(60):
    trained, state, value = step(trained, state)
    losses.append(np.asarray(value))
  assert np.isfinite(losses).all()
  assert losses[-1][2] < 0.8 * losses[0][2]
  assert jnp.isfinite(dataclasses.replace(t, trained=trained).dense()).all()


SHARES = np.float32([0.0, 1e-7, 1e-5, 1e-3, 0.1, 0.5, 1.0, 3.0])
"""What the adapter leaves of a column."""


@functools.cache
def cancelled(width=64, columns=2000):
  """Returns (method, arrays, matrix): columns that are nearly cancelled.

  At full rank, so that the update can be any matrix.
  """
  method = DoRA(rank=width, alpha=1.5 * width)
  w, a = drawn(width, columns, seed=3), drawn(width, width, seed=4)
  left = SHARES[np.arange(columns) % len(SHARES)]
  update = np.float64(w) * (np.float64(left) - 1) / method.scale
  b = jnp.asarray(np.linalg.solve(np.float64(a).T, update), jnp.float32)
  m = jnp.linalg.norm(w, axis=0)
  return method, {"a": a, "b": b, "m": m}, w


def test_the_norm_of_nearly_cancelled_columns():
  method, p, w = cancelled()
  found = np.asarray(jax.jit(method._norm)(p, w))
  a, b, base = (np.float64(x) for x in (p["a"], p["b"], w))
  want = np.linalg.norm(base + method.scale * a.T @ b, axis=0)
  # Each element is a sum of 65 terms in fp32; its error is theirs in size.
  terms = np.abs(base) + method.scale * np.abs(a).T @ np.abs(b)
  bound = 66 * EPS * np.linalg.norm(terms, axis=0)
  assert (np.abs(found - want) <= bound).all()
  # Which is not for want of trying: the expanded square does go below 0.
  assert found.min() >= 0
  expanded, safe = jax.jit(method._expanded)(p, w)
  assert (expanded < 0).mean() > 0.02 and not safe.all()


def test_nearly_cancelled_columns_multiply_and_merge():
  method, p, w = cancelled()
  t, x = AdaptedTensor(w, p, method=method), drawn(5, 64)

  def outputs(p):
    w = dataclasses.replace(t, trained=p)
    return weights.einsum("td,df->tf", x, w)

  @jax.jit
  def all_of_it(p):
    slopes = jax.grad(lambda p: jnp.sin(outputs(p)).sum())(p)
    return outputs(p), slopes, dataclasses.replace(t, trained=p).dense()

  got, slopes, merged = all_of_it(p)
  for found in (got, merged, *slopes.values()):
    assert jnp.isfinite(found).all()
  # Every column that is left has its magnitude, whatever is left of it.
  left = SHARES[np.arange(w.shape[1]) % len(SHARES)] >= 1e-3
  lengths = jnp.linalg.norm(merged, axis=0)[left]
  chex.assert_trees_all_close(lengths, p["m"][left], rtol=2e-3)


def test_safe_columns_use_the_expanded_square():
  """No matrix is formed if at most two bits are lost."""
  method, (a, b) = DoRA(rank=RANK), (drawn(RANK, IN), drawn(RANK, OUT, seed=1))
  w = drawn(IN, OUT, seed=2)
  p = {"a": a, "b": 0.02 * b}
  expanded, safe = method._expanded(p, w)
  assert safe.all()
  want = jnp.linalg.norm(w + method.scale * a.T @ p["b"], axis=0)
  chex.assert_trees_all_close(jnp.sqrt(expanded), want, rtol=4 * IN * EPS)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_over_an_adapter_that_is_trained(dropout):
  """The norm is that of the current base, not of the initial one."""
  a, b = drawn(RANK, IN, seed=5), drawn(RANK, OUT, seed=6)
  inner = lora(drawn(IN, OUT), a, jnp.zeros_like(b), dropout=dropout)
  t = fresh(inner, DoRA(rank=RANK))
  moved = dataclasses.replace(inner, trained={"a": a, "b": b})
  t = dataclasses.replace(t, w=moved)
  # Nothing of its own has been learned: lengths are those of the start.
  below = moved.dense()
  want = (
    below * jnp.linalg.norm(inner.w, axis=0) / jnp.linalg.norm(below, axis=0)
  )
  chex.assert_trees_all_close(t.dense(), want, rtol=1e-5)
  x = drawn(5, IN, seed=7)
  quiet = weights.einsum("td,df->tf", x, t)
  chex.assert_trees_all_close(quiet, x @ want, rtol=1e-4, atol=1e-4)
  # What is dropped of inputs is nothing of the norm.
  bound = weights.bind({"w": t}, key=jax.random.key(1))["w"]
  gains = [t.method._gain(x.arrays, x.w) for x in (t, bound)]
  chex.assert_trees_all_equal(*gains)


def test_over_a_base_that_is_trained():
  t = fresh(drawn(IN, OUT), DoRA(rank=RANK))
  moved = dataclasses.replace(t, w=3 * t.w)
  chex.assert_trees_all_close(moved.dense(), t.w, rtol=1e-5)
