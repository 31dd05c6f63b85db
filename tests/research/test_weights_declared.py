"""What a `Weight` is by its defaults: whatever has an array behaves as one."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from tests import support


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored(weights.Weight):
  """The least that a subclass has to say."""

  x: Any

  shape = property(lambda self: self.x.shape)
  dtype = property(lambda self: self.x.dtype)

  def dense(self):
    return self.x

  def axes(self, names):
    return Stored(weights.axes(self.x, names))


def array(*shape):
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  return jnp.asarray(x)


W, IDS, X = array(6, 4), jnp.array([[3, 0, 5]]), array(2, 3, 6)
EXPERTS, SIZES = array(3, 6, 4), jnp.array([2, 0, 4])


@pytest.mark.parametrize(
  ("ask", "w"),
  [
    (lambda w: weights.einsum("...d,df->...f", X, w), W),
    (lambda w: weights.einsum("...d,vd->...v", X[..., :4], w), W),
    (lambda w: weights.take(w, IDS), W),
    (lambda w: weights.ragged_dot(X.reshape(-1, 6), w, SIZES), EXPERTS),
    (weights.dense, W),
    (lambda w: weights.scaled_bias(w, W[0]), W),
    (lambda w: jnp.float32(weights.count({"a": w})), W),
    (lambda w: weights.dense(weights.map_inner(w, lambda x: x)), W),
    (lambda w: weights.dense(weights.bind({"a": w}, key=None)["a"]), W),
  ],
)
def test_by_default_it_is_what_its_array_is(ask, w):
  chex.assert_trees_all_equal(ask(Stored(w)), ask(w))


def test_what_is_asked_of_any_leaf():
  stored = Stored(W)
  assert weights.is_weight(stored) and not weights.is_weight(W)
  for asked in (weights.is_packed, weights.is_adapter, weights.is_renewable):
    assert not asked(stored) and not asked(W)
  assert weights.unwrap(stored) is None and weights.unwrap(W) is None
  assert stored.ndim == 2
  params = {"run0": {"layer0": {"q": stored, "norm": W[0]}}}
  found = dict(weights.named_weights(params))
  assert found.keys() == {"run0/layer0/q", "run0/layer0/norm"}
  assert found["run0/layer0/q"] is stored
  tokens = jnp.zeros((1, 3), jnp.int32)
  same = weights.select_tokens(weights.with_tokens(params, tokens), tokens)
  chex.assert_trees_all_equal(same, params)


def test_a_model_runs_on_it():
  """No module knows."""
  model = support.model(tied=True)
  params = support.params(model)

  def stored(path, x):
    return Stored(x) if x.ndim > 1 and "norm" not in path else x

  kept = tree.map_paths(stored, params)
  read = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])
  tokens = support.tokens()
  got, want = read(kept, tokens), read(params, tokens)
  chex.assert_trees_all_close(got, want, atol=2e-5 * float(abs(want).max()))
