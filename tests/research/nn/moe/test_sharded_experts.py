"""Experts on a mesh: cases that training does not cover."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding, weights
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from tests.support_lora import lora

D, F, T = 16, 24, 6
ROUTING = Routing(experts=4, active=2)
MODULE = Moe(routing=ROUTING, hidden=F)


def params(dropout=0.0):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)

  def adapted(rows, columns):
    w, a, b = draw(4, rows, columns), draw(4, 2, rows), draw(4, 2, columns)
    return lora(w, a, b, scale=1.0, dropout=dropout)

  experts = dict(gate=adapted(D, F), up=adapted(D, F), down=adapted(F, D))
  return {"router": draw(D, 4), "experts": experts}


def applied(params, x, real, layout=None):
  run = jax.jit(lambda p, *x: MODULE.apply({"params": p}, *x))
  if layout is None:
    return run(params, x, real)
  mesh = layout.mesh()
  with jax.set_mesh(mesh):
    return run(*jax.device_put((params, x, real), sharding.replicated(mesh)))


@pytest.mark.slow
@pytest.mark.parametrize(
  "layout",
  [
    # One row cannot be cut: all devices have the tokens, and some experts.
    dict(data=2, expert=4),
    dict(data=1, expert=2, tensor=4),
    # Nor can 24 hidden units over 16, or three tokens over two.
    dict(data=1, sequence=4, tensor=2),
    dict(data=4, fsdp=2),
  ],
)
@pytest.mark.sample(5)
def test_what_an_axis_does_not_divide_is_computed_everywhere(layout):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((1, T, D)), jnp.float32)
  real = jnp.arange(T)[None] < 4
  want = applied(params(), x, real)
  got = applied(params(), x, real, sharding.Layout(**layout))
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
  assert got[1].tokens == 4


@pytest.mark.slow
def test_devices_drop_different_inputs():
  rng = np.random.default_rng(2)
  row = jnp.asarray(rng.standard_normal((1, T, D)), jnp.float32)
  x, real = jnp.concatenate([row] * 4), jnp.ones((4, T), bool)
  bound = weights.bind(params(dropout=0.5), key=jax.random.key(1))
  layout = sharding.Layout(data=2, expert=2, tensor=2)
  y, load = applied(bound, x, real, layout)
  for other in y[1:]:
    assert jnp.abs(other - y[0]).max() > 1e-2
  # The router has no adapter: its choices are the same.
  np.testing.assert_array_equal(load.counts % 4, 0)
